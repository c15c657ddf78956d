"""What is asked of the GPU, one row a figure, and how it is printed: `benchmarks/gpu.py` measures them, `benchmarks/summary.py` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "*not measured*"


@dataclass(frozen=True)
class Goal:
    """at_least: of the figure, which is a ratio; against: what it is a ratio to."""

    name: str
    at_least: float
    against: str


COPY = "copy bandwidth of the same run"
VENDOR = "the vendor's product"
COMPILED = 'torch.compile(mode="max-autotune")'
GOALS = (
    Goal("RMS norm, bf16 32768 x 8192", 0.9, COPY),
    Goal("residual + layer norm, bf16 32768 x 8192", 0.9, COPY),
    Goal("bias + GELU, bf16 32768 x 8192", 0.9, COPY),
    Goal("SwiGLU of a packed product, bf16 16384 x 16384", 0.9, COPY),
    Goal("SwiGLU with its product, bf16 1 x 4096 by 22016", 0.8, COPY),
    Goal("rotary embedding, bf16 4 x 16384 x 32 x 128", 0.8, COPY),
    Goal("softmax, bf16 32768 x 8192", 0.85, COPY),
    Goal("attention, bf16 head 128, 16k tokens", 0.75, "fastest backend of SDPA"),
    Goal("causal attention, bf16 head 128, 16k tokens", 0.75, "fastest backend of SDPA"),
    Goal("attention with sizes of merged tokens, bf16 head 64, 4k tokens", 1.5, "SDPA with a mask"),
    Goal("window of 1024 at 16k tokens", 1.0, "FlexAttention"),
    Goal("window of 1024 against 4096 at 32k tokens", 0.75, "a quarter of the time"),
    Goal("decode, bf16 batch 16, 32k keys, 8 key heads", 0.8, COPY),
    Goal("token matching, bf16 64 x 197 x 64, r = 13", 5.0, "the same in eager torch"),
    Goal("product with K divided, bf16 4 x 16384 by 1024", 1.0, VENDOR),
    Goal("weights of four bits, bf16 4 x 4096 by 11008, groups of 128", 2.0, "the vendor's product with bf16 weights"),
    Goal("tuned schedule of causal attention, bf16 head 128, 16k tokens", 1.0, "the template's default"),
    Goal("CUDA graph of BERT-base, bf16 1 x 128", 1.0, "the same launches one by one"),
    Goal("ViT-L/16, bf16 batch 64, exact plan", 1.0, COMPILED),
    Goal("ViT-L/16, bf16 batch 64, plan within a drift of 0.1", 1.6, COMPILED),
    Goal("BERT-base, bf16 batch 32 x 512, exact plan", 1.0, COMPILED),
    Goal("Llama 1B prefill, bf16 1 x 2048, exact plan", 1.0, COMPILED),
    Goal("Llama 1B decode, bf16 batch 8 after 1023, exact plan", 1.0, COMPILED),
)


def table(found: dict[str, Any]) -> list[str]:
    """Lines of a table. found: goal's name -> its ratio, or why there is none."""
    lines = ["| figure | goal | against | measured | met |", "| --- | --- | --- | --- | --- |"]
    for goal in GOALS:
        value = found.get(goal.name, NOT_MEASURED)
        is_number = isinstance(value, float)
        shown, met = (f"{value:.2f}", "met" if value >= goal.at_least else "not met") if is_number else (str(value), "")
        lines.append(f"| {goal.name} | >= {goal.at_least:.2f} | {goal.against} | {shown} | {met} |")
    return lines
