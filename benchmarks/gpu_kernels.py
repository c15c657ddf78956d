"""The kernels that `benchmarks/gpu.py` times: each as a graph of one region, with what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paretorch.codegen.kernel import Kernel, Region, Schedule
from paretorch.codegen.region_inputs import region_inputs
from paretorch.codegen.regions import can_compute, forms_of, region_of
from paretorch.codegen.triton_text import render
from paretorch.ir.builder import build
from paretorch.ir.ops import aten
from paretorch.ir.types import DTYPES, parse_type

DEVICE = "cuda"
ROWS, WIDTH = 32768, 8192
Made = tuple[Callable[[], object], int]


def one_region(function: Callable[..., Any], **types: str) -> Region:
    """All nodes of this function that a kernel can compute."""
    graph = build("one", function, **{name: parse_type(text) for name, text in types.items()})
    return region_of([node for node in graph.calls if can_compute(node)])


def kernel_of(function: Callable[..., Any], **types: str) -> tuple[Kernel, list[Tensor]]:
    """The kernel of all nodes of this function, and random inputs on the GPU in the order that it reads."""
    region = one_region(function, **types)
    return render(region), region_inputs(region, DEVICE)


def call_of(function: Callable[..., Any], **types: str) -> Made:
    """(a launch, the bytes that it must move)."""
    made, inputs = kernel_of(function, **types)
    results = made.launch(*inputs)
    written = results if isinstance(results, tuple) else (results,)
    moved = sum(x.numel() * x.element_size() for x in (*inputs, *written))
    return lambda: made.launch(*inputs), moved


def swiglu(b: Any, packed: Any, width: int) -> Any:
    halves = b.split(packed, width, -1)
    return b.mul(b.silu(b.item(halves, 0)), b.item(halves, 1))


def streaming() -> dict[str, Callable[[], Made]]:
    """Goal's name -> what makes its kernel and bytes, of those that are bounded by memory; made one at a time, since each fills gigabytes."""
    row, channel = f"bf16[{ROWS},{WIDTH}]", f"bf16[{WIDTH}]"

    def residual(b: Any, x: Any, y: Any, weight: Any, bias: Any) -> Any:
        total = b.add(x, y)
        return total, b.layer_norm(total, [WIDTH], weight, bias, 1e-5)

    def gated(b: Any, packed: Any) -> Any:
        return swiglu(b, packed, WIDTH)

    def rotary(b: Any, x: Any, cos: Any, sin: Any) -> Any:
        turned = b.permute(x, [0, 2, 1, 3])
        left, right = b.slice(turned, -1, 0, 64), b.slice(turned, -1, 64)
        return b.add(b.mul(turned, cos), b.mul(b.cat([b.neg(right), left], -1), sin))

    return {
        "RMS norm, bf16 32768 x 8192": lambda: call_of(lambda b, x, w: b.rms_norm(x, [WIDTH], w, 1e-6), x=row, w=channel),
        "residual + layer norm, bf16 32768 x 8192": lambda: call_of(residual, x=row, y=row, weight=channel, bias=channel),
        "bias + GELU, bf16 32768 x 8192": lambda: call_of(lambda b, x, bias: b.gelu(b.add(x, bias)), x=row, bias=channel),
        "SwiGLU of a packed product, bf16 16384 x 16384": lambda: call_of(gated, packed=f"bf16[16384,{2 * WIDTH}]"),
        "rotary embedding, bf16 4 x 16384 x 32 x 128": lambda: call_of(
            rotary, x="bf16[4,16384,32,128]", cos="bf16[16384,128]", sin="bf16[16384,128]"
        ),
        "SwiGLU with its product, bf16 1 x 4096 by 22016": lambda: call_of(
            lambda b, x, weight: swiglu(b, b.linear(x, weight), 11008), x="bf16[1,4096]", weight="bf16[22016,4096]"
        ),
        "softmax, bf16 32768 x 8192": lambda: call_of(lambda b, x: b.call(aten("softmax.int"), (x, -1)), x=row),
        "decode, bf16 batch 16, 32k keys, 8 key heads": lambda: call_of(
            lambda b, q, k, v: b.attention(q, k, v, scale=0.09),
            q="bf16[16,32,1,128]", k="bf16[16,8,32768,128]", v="bf16[16,8,32768,128]",
        ),
    }  # fmt: skip


def attention(batch: int, heads: int, tokens: int, width: int, **options: int) -> tuple[Callable[[], object], list[Tensor]]:
    """Our kernel and its inputs."""
    shape = f"bf16[{batch},{heads},{tokens},{width}]"
    made, inputs = kernel_of(lambda b, q, k, v: b.attention(q, k, v, scale=width**-0.5, **options), q=shape, k=shape, v=shape)
    return lambda: made.launch(*inputs), inputs


def scheduled(schedules: Callable[[list[Region]], list[Schedule]]) -> tuple[Callable[[], object], Callable[[], object]]:
    """(causal attention with the schedule that is chosen for it, the same with its template's default)."""
    shape = dict.fromkeys("qkv", "bf16[1,16,16384,128]")
    region = one_region(lambda b, q, k, v: b.attention(q, k, v, scale=128**-0.5, right=0), **shape)
    inputs = region_inputs(region, DEVICE)
    made, default = render(region, 0, schedules([region])[0]), render(region)
    return lambda: made.launch(*inputs), lambda: default.launch(*inputs)


def sized(batch: int, heads: int, tokens: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """(our kernel with a number for each key, SDPA with a mask of it)."""
    shape = f"bf16[{batch},{heads},{tokens},{width}]"
    made, inputs = kernel_of(
        lambda b, q, k, v, s: b.attention(q, k, v, None, s, scale=width**-0.5), q=shape, k=shape, v=shape, s=f"f32[{batch},{tokens}]"
    )
    query, key, value, bias = inputs
    mask = bias.to(query.dtype)[:, None, None, :].expand(batch, 1, tokens, tokens)
    return lambda: made.launch(*inputs), lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def divided() -> tuple[Callable[[], object], Callable[[], object]]:
    """(our product of few rows whose K several programs share, the vendor's)."""
    whole = one_region(lambda b, x, weight: b.linear(x, weight), x="bf16[4,16384]", weight="bf16[1024,16384]")
    (region,) = (form for form in forms_of(whole) if form.template == "split_product")
    made, (x, weight) = render(region), region_inputs(region, DEVICE)
    return lambda: made.launch(x, weight), lambda: F.linear(x, weight)


def four_bits() -> tuple[Callable[[], object], Callable[[], object]]:
    """(our product with weights of four bits, the vendor's with weights of sixteen)."""
    types = {"x": "bf16[4,4096]", "weight": "u8[11008,32,64]", "scale": "bf16[11008,32]"}
    made, inputs = kernel_of(lambda b, x, weight, scale: b.int4_linear(x, weight, scale), **types)
    plain = torch.randn(11008, 4096, device=DEVICE, dtype=DTYPES["bf16"])
    return lambda: made.launch(*inputs), lambda: F.linear(inputs[0], plain)


def matching() -> tuple[Callable[[], object], Callable[[], object]]:
    """(our kernel, the op's definition in eager torch)."""

    def match(b: Any, metric: Any, size: Any) -> Any:
        found = b.match_tokens(metric, size, 13, 1)
        return tuple(b.item(found, place) for place in range(3))

    graph = build("one", match, metric=parse_type("bf16[64,197,64]"), size=parse_type("f32[64,197]"))
    made = render(region_of(graph.calls[:1]))
    metric, size = torch.randn(64, 197, 64, device=DEVICE, dtype=DTYPES["bf16"]), torch.ones(64, 197, device=DEVICE)
    return lambda: made.launch(metric, size), lambda: torch.ops.paretorch.match_tokens(metric, size, 13, 1)
