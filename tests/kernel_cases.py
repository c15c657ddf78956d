"""Graphs for tests of generated kernels: a family of functions for every kind of region, at any rows, width and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.kernel import Kernel, Region
from paretorch.codegen.regions import can_compute, region_of
from paretorch.codegen.triton_text import render
from paretorch.ir.builder import build
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.types import parse_type

# What computing in f32 and rounding once leaves against f64 rounded once, relative to the largest result: a few units in the last place of each
# type, and more where a sum over thousands of columns is taken in another order.
TOLERANCE = {"f64": 1e-11, "f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}
DTYPES = ("f32", "f16", "bf16")
SHAPES = {"one": (1, 1), "odd": (3, 17), "prime": (7, 127), "power": (4, 256), "more than a block": (5, 1031)}
LONG = (2, 16411)  # rows that take several blocks


@dataclass(frozen=True)
class Family:
    """function: of a builder and values; types: (dtype, rows, width) -> the types of its inputs."""

    function: Callable[..., Any]
    types: Callable[[str, int, int], dict[str, str]]

    def graph(self, dtype: str, rows: int, width: int) -> Graph:
        return graph_of(self.function, **self.types(dtype, rows, width))


def graph_of(function: Any, **types: str) -> Graph:
    return build("one", function, **{name: parse_type(text) for name, text in types.items()})


def region(graph: Graph) -> Region:
    """All that a kernel can compute in this graph, as one region."""
    return region_of([node for node in graph.calls if can_compute(node)])


def kernel(graph: Graph, number: int = 0) -> Kernel:
    return render(region(graph), number)


def read_by(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs in the order in which the region reads them."""
    return [inputs[graph.inputs.index(node)] for node in region(graph).reads]


def inputs_of(graph: Graph, seed: int = 0, hint: int = 5) -> list[Tensor]:
    """Random inputs; a symbolic size is `hint`."""
    generator, inputs = torch.Generator().manual_seed(seed), []
    for node in graph.inputs:
        fake = node.meta["val"]
        shape = [size if isinstance(size, int) else hint for size in fake.shape]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs.append(x > 0 if fake.dtype == torch.bool else (x * 3).to(fake.dtype))
    return inputs


def in_f64(function: Any, types: dict[str, str], inputs: list[Tensor]) -> tuple[Any, ...]:
    """The same function with every floating input in f64."""
    wide = {name: f"f64{text[text.index('[') :]}" if text.split("[")[0] in TOLERANCE else text for name, text in types.items()}
    return graph_of(function, **wide).run(*(x.double() if x.is_floating_point() else x for x in inputs))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for b, a in zip(found, expected, strict=True):
        assert b.shape == a.shape
        if b.is_floating_point():
            scale = float(a.abs().max()) if a.numel() else 1.0
            torch.testing.assert_close(b.double(), a.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))
        else:
            assert torch.equal(b, a)


def width_of(x: Any) -> int:
    return x.meta["val"].shape[-1]


# functions


def add_layer_norm(b: Any, x: Any, residual: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    total = b.add(x, residual)
    return total, b.gelu(b.layer_norm(total, [width_of(x)], weight, bias, 1e-5))


def scaled_rms_norm(b: Any, x: Any, weight: Any, scale: Any, gate: Any) -> Any:
    normed = b.rms_norm(b.mul(x, scale), [width_of(x)], weight, 1e-6)
    return b.mul(b.silu(gate), b.call(aten("_to_copy.default"), (normed,), {"dtype": gate.meta["val"].dtype}))


def masked_softmax(b: Any, scores: Any, seen: Any, factor: Any) -> Any:
    return b.softmax(b.call(aten("where.ScalarOther"), (seen, b.mul(scores, factor), -1e4)), -1)


def statistics(b: Any, x: Any) -> tuple[Any, ...]:
    square = b.call(aten("mean.dim"), (b.mul(x, x), [-1], True))
    return b.mul(x, b.rsqrt(b.add(square, 1.0))), b.amax(x, [-1]), b.logsumexp(x, [-1], True)


def spelled_softmax(b: Any, x: Any) -> Any:
    powers = b.exp(b.sub(x, b.amax(x, [-1], True)))
    return b.div(powers, b.call(aten("sum.dim_IntList"), (powers, [-1], True)))


def chain(b: Any, x: Any, channel: Any, number: Any, mask: Any) -> tuple[Any, Any]:
    y = b.mul(b.add(x, channel), number)
    return b.tanh(b.where(mask, b.gelu(y, approximate="tanh"), y)), b.call(aten("gt.Scalar"), (y, 0.5))


def packed_gate(b: Any, packed: Any) -> Any:
    halves = b.split(packed, width_of(packed) // 2, -1)
    return b.mul(b.silu(b.item(halves, 0)), b.item(halves, 1))


def rotary(b: Any, x: Any, cos: Any, sin: Any) -> Any:
    """x: T[B, T, H, D], turned to [B, H, T, D] before."""
    half, heads_first = width_of(x) // 2, b.permute(x, [0, 2, 1, 3])
    left, right = b.slice(heads_first, -1, 0, half), b.slice(heads_first, -1, half)
    return b.add(b.mul(heads_first, cos), b.mul(b.cat([b.neg(right), left], -1), sin))


def vector(dtype: str, *sizes: int) -> str:
    return f"{dtype}[{','.join(map(str, sizes))}]"


FAMILIES: dict[str, Family] = {
    "layer_norm": Family(
        add_layer_norm,
        lambda dtype, rows, width: {
            "x": vector(dtype, rows, width), "residual": vector(dtype, rows, width), "weight": vector(dtype, width), "bias": vector(dtype, width),
        },
    ),
    "rms_norm": Family(
        scaled_rms_norm,
        lambda dtype, rows, width: {
            "x": vector(dtype, 2, rows, width), "weight": vector(dtype, width), "scale": vector(dtype, 2, 1, width),
            "gate": vector(dtype, 2, rows, width),
        },
    ),
    "softmax": Family(
        masked_softmax,
        lambda dtype, rows, width: {"scores": vector(dtype, 2, rows, width), "seen": vector("bool", rows, width), "factor": vector(dtype)},
    ),
    "statistics": Family(statistics, lambda dtype, rows, width: {"x": vector(dtype, rows, width)}),
    "spelled_softmax": Family(spelled_softmax, lambda dtype, rows, width: {"x": vector(dtype, rows, width)}),
    "chain": Family(
        chain,
        lambda dtype, rows, width: {
            "x": vector(dtype, rows, 3, width), "channel": vector(dtype, 3, width), "number": vector(dtype), "mask": vector("bool", rows, 1, width),
        },
    ),
    "packed_gate": Family(packed_gate, lambda dtype, rows, width: {"packed": vector(dtype, rows, 2 * width)}),
    "rotary": Family(
        rotary,
        lambda dtype, rows, width: {
            "x": vector(dtype, 2, rows, 3, 2 * width), "cos": vector(dtype, rows, 2 * width), "sin": vector(dtype, rows, 2 * width),
        },
    ),
}  # fmt: skip
