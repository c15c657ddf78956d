"""PP-OCRv4's text recogniser (SVTR-LCNet: convolutions and two attention layers, CTC over 6,625 characters).

Weights: the ONNX file inside rapidocr-onnxruntime 1.4.4 (Apache-2.0), imported as a torch module. Lines of text are drawn with a system font, so
their transcripts are exact: 0.64 % character errors on 64 lines for the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fetch import fetch
from benchmarks.workloads import onnx_fx
from benchmarks.workloads.base import Case, Workload

HEIGHT, WIDTH = 48, 480
FONT = Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")


class Recogniser(nn.Module):
    """f32[B, 3, 48, 480] -> probabilities f32[B, 60, 6625]. batch is fixed by the sample that it was imported with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)[0]


def load(images: Tensor) -> tuple[Recogniser, list[str]]:
    """The recogniser for this batch size, and its alphabet (entry 0 is CTC's blank)."""
    path = fetch("rapidocr") / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    module, metadata = onnx_fx.load(path, {"x": images.numpy()})
    return Recogniser(module).eval(), ["", *metadata["character"].split("\n"), " "]


@cache
def lines(count: int = 64) -> tuple[Tensor, list[str]]:
    """Drawn lines f32[count, 3, 48, 480] with noise, and their texts."""
    from PIL import Image, ImageDraw, ImageFont

    font, chance = ImageFont.truetype(str(FONT), 30), np.random.RandomState(0)
    source = iter((fetch("gensim") / "gensim/test/test_data/lee.cor").read_text("latin-1").split())
    texts, images, word = [], [], next(source)
    while len(texts) < count:
        text = word
        while font.getlength(f"{text} {(word := next(source))}") < WIDTH - 16:
            text += " " + word
        image = Image.new("L", (WIDTH, HEIGHT), 255)
        ImageDraw.Draw(image).text((6, 6), text, fill=0, font=font)
        noisy = np.asarray(image).astype("f") + chance.randn(HEIGHT, WIDTH) * 18
        images.append(np.repeat(((np.clip(noisy, 0, 255) / 255 - 0.5) / 0.5)[None], 3, 0))
        texts.append(text)
    return torch.from_numpy(np.stack(images).astype("f")), texts


def decode(probabilities: Tensor, alphabet: list[str]) -> str:
    """Greedy CTC."""
    text, last = "", 0
    for best in probabilities.argmax(1).tolist():
        if best not in (last, 0):
            text += alphabet[best]
        last = best
    return text.strip()


def character_errors(model: nn.Module, alphabet: list[str], batch: int) -> float:
    """Edits per character over all lines."""
    from benchmarks.workloads.whisper import edits

    images, texts = lines()
    with torch.inference_mode():
        found = [decode(p, alphabet) for i in range(0, len(texts), batch) for p in model(images[i : i + batch])]
    return sum(edits(a, b) for a, b in zip(texts, found, strict=True)) / sum(map(len, texts))


def cases() -> Sequence[Case]:
    images = lines()[0][:1].contiguous()
    return [Case("pp-ocrv4 recogniser, batch 1", load(images)[0], (images,))]


WORKLOAD = Workload("ppocr", __doc__ or "", cases, None, "Apache-2.0")
