"""Probes: the small graphs that calibration times, each a chain of one op, over rows that are chosen when it is run.

Every probe takes one input of which one axis is symbolic, so that one compiled graph holds many probes, of which those that are not being
measured get no rows and cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.ops.quantized import quantized_int4, quantized_int8
from paretorch.ir.types import DTYPES, TensorType

Body = Callable[[Builder, Node, str], Node]


@dataclass(frozen=True)
class Probe:
    """curve: the price curve that its points belong to; link: (builder, x, dtype) -> y, of which `repeats` stand in a row; some links have views.

    shape: of the input without the axis that varies, which is put in at place `axis`; rows: its sizes to measure; integers: the input
    holds indices below this. idle_rows: with which it does next to nothing, one for attention, of which some runtimes take no empty tensors.
    serves: further op names and kinds that its curve prices. is_executed_view: a view that ONNX runtimes execute as a copy.
    narrowed: only the first column of the result is returned, so that handing out results, which a runtime may copy, is not measured with the op.
    is_whole: several ops as they stand in models, compiled as a model is, at each size alone; its dispatch stays in the sample.
    half: whether it is measured at half precision too. quick: whether the quick form measures it. ops: among which the seconds of a link are shared.
    composite: an op that runtimes without a form of it run as its definition, which then is its price.
    """

    name: str
    curve: str
    link: Body
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    repeats: int = 1
    axis: int = 0
    idle_rows: int = 0
    integers: int = 0
    serves: tuple[str, ...] = ()
    is_executed_view: bool = False
    narrowed: bool = True
    is_whole: bool = False
    half: bool = True
    quick: bool = True
    ops: int = 1
    composite: bool = False

    def body(self, b: Builder, x: Node, dtype: str) -> Node:
        """The whole chain."""
        for _ in range(self.repeats):
            x = self.link(b, x, dtype)
        return x

    def sizes(self, rows: Any) -> tuple[Any, ...]:
        """The shape of the input at so many rows, a number or a symbol."""
        return (*self.shape[: self.axis], rows, *self.shape[self.axis :])

    def input(self, rows: int, dtype: str, place: str) -> Tensor:
        """A random input, the same each time. place: the torch device that it lies on."""
        draws = torch.Generator().manual_seed(rows)
        if self.integers:
            return torch.randint(self.integers, self.sizes(rows), generator=draws).to(place)
        return torch.randn(self.sizes(rows), generator=draws).to(place, DTYPES[dtype])


def weight(b: Builder, name: str, dtype: str, *shape: int) -> Node:
    """A random constant whose products keep the size of what they multiply; on the meta device it has no values."""
    place = torch.get_default_device()
    values = torch.empty(shape, dtype=DTYPES[dtype]) if place.type == "meta" else _values(len(b.graph.constants), shape, dtype).to(place)
    return b.constant(f"{name}_{len(b.graph.constants)}", values)


@cache
def _values(seed: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Shared by all graphs of a calibration: drawing them takes longer than most of what is measured."""
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=draws, device="cpu") / math.sqrt(math.prod(shape[1:]) or 1)
    return values.to(DTYPES[dtype])


def forget_values() -> None:
    """Free the values of constants, which graphs share."""
    _values.cache_clear()
    _integers.cache_clear()


def square(width: int) -> Body:
    """A linear that keeps the width, with weights of its own."""
    return lambda b, x, dtype: linear(b, x, dtype, width, width)


def rounded_square(op: str, width: int) -> Body:
    """A linear that keeps the width, with weights of eight or four bits. op: "int8_linear" or "int4_linear"."""

    def link(b: Builder, x: Node, dtype: str) -> Node:
        values, scale = (value.to(torch.get_default_device()) for value in _integers(op, width))
        number = len(b.graph.constants)
        held = b.constant(f"q_{number}", values), b.constant(f"s_{number}", scale)
        found: Node = getattr(b, op)(x, *held, weight(b, "b", dtype, width))
        return found

    return link


@cache
def _integers(op: str, width: int) -> tuple[Tensor, Tensor]:
    """Weights [width, width] of these bits and their scales; of four bits with groups of a length between the shortest and the longest."""
    weights = _values(0, (width, width), "f32")
    return quantized_int8(weights) if op == "int8_linear" else quantized_int4(weights, 64)


def attentions(causal: bool = False) -> Body:
    """x: [B, H, T, D] as query, key and value."""
    side = 0 if causal else -1
    return lambda b, x, dtype: b.attention(x, x, x, scale=0.125, right=side)


def packed_attention(b: Builder, x: Node, dtype: str) -> Node:
    """x: [B, T, 3 * H * D], split into heads, attended, and joined again: attention with the moves that a model makes around it."""
    split = b.permute(b.view(x, [BATCH, -1, 3, HEADS, 64]), [2, 0, 3, 1, 4])
    query, key, value = (b.item(b.unbind(split, 0), place) for place in range(3))
    mixed = b.attention(query, key, value, scale=0.125)
    return b.call(aten("reshape.default"), (b.permute(mixed, [0, 2, 1, 3]), [BATCH, -1, HEADS * 64]))


def convolution(channels: int, taps: int, groups: int) -> Body:
    def link(b: Builder, x: Node, dtype: str) -> Node:
        kernel = weight(b, "k", dtype, channels, channels // groups, taps, taps)
        return b.convolution(x, kernel, weight(b, "b", dtype, channels), [1, 1], [taps // 2, taps // 2], [1, 1], groups)

    return link


def norm(width: int) -> Body:
    return lambda b, x, dtype: b.layer_norm(x, [width], weight(b, "g", dtype, width), weight(b, "b", dtype, width))


def applied(name: str, *arguments: object) -> Body:
    """The op of this name."""
    return lambda b, x, dtype: getattr(b, name)(x, *arguments)


def sums(b: Builder, x: Node, dtype: str) -> Node:
    """One add of two tensors of the same size."""
    return b.add(x, x)


def sum_chain(b: Builder, x: Node, dtype: str) -> Node:
    """Five pointwise ops that a compiler may fuse into one pass: one add, then four further ones."""
    y = b.add(x, x)
    for _ in range(2):
        y = b.mul(b.add(y, x), x)
    return y


def norm_of_sum(b: Builder, x: Node, dtype: str) -> Node:
    """An add and the norm that follows it, three times."""
    for _ in range(3):
        x = b.layer_norm(b.add(x, x), [384], weight(b, "g", dtype, 384), weight(b, "b", dtype, 384))
    return x


def linear_and_sum(b: Builder, x: Node, dtype: str) -> Node:
    """Narrow linears, each followed by a pointwise op and a residual add, beside which they are not long."""
    for _ in range(NARROW_COUNT):
        y = b.linear(x, weight(b, "w", dtype, NARROW, NARROW), weight(b, "b", dtype, NARROW))
        x = b.add(b.relu(y), x)
    return x


def batch_norm(channels: int) -> Body:
    def link(b: Builder, x: Node, dtype: str) -> Node:
        scale, shift, mean = (weight(b, "n", dtype, channels) for _ in range(3))
        variance = b.constant(f"v_{len(b.graph.constants)}", ones(dtype, channels))
        return b.batch_norm(x, scale, shift, mean, variance, False, 0.1, 1e-5, False)

    return link


def ones(dtype: str, size: int) -> Tensor:
    return torch.ones(size, dtype=DTYPES[dtype])


def convolution_and_norm(b: Builder, x: Node, dtype: str) -> Node:
    """Pointwise convolutions, each followed by a batch norm, a residual add and a pointwise op."""
    for _ in range(NORMED_COUNT):
        y = convolution(CONVOLVED, 1, 1)(b, x, dtype)
        x = b.relu(b.add(batch_norm(CONVOLVED)(b, y, dtype), x))
    return x


def block(b: Builder, x: Node, dtype: str) -> Node:
    """x: [1, T, BLOCK_WIDTH] through a pre-norm transformer block: the ops of the other probes among each other."""
    width, heads = BLOCK_WIDTH, BLOCK_WIDTH // 64
    packed = linear(b, norm(width)(b, x, dtype), dtype, 3 * width, width)
    split = b.permute(b.view(packed, [1, -1, 3, heads, 64]), [2, 0, 3, 1, 4])
    query, key, value = (b.item(b.unbind(split, 0), place) for place in range(3))
    mixed = b.permute(b.attention(query, key, value, scale=0.125), [0, 2, 1, 3])
    joined = b.call(aten("reshape.default"), (mixed, [1, -1, width]))
    x = b.add(x, linear(b, joined, dtype, width, width))
    grown = b.gelu(linear(b, norm(width)(b, x, dtype), dtype, 4 * width, width))
    return b.add(x, linear(b, grown, dtype, width, 4 * width))


def linear(b: Builder, x: Node, dtype: str, to: int, width: int) -> Node:
    return b.linear(x, weight(b, "w", dtype, to, width), weight(b, "b", dtype, to))


def residual(b: Builder, x: Node, dtype: str) -> Node:
    """Two 3x3 convolutions, each with a norm, around which the input is added."""
    y = b.relu(batch_norm(RESIDUAL_WIDTH)(b, convolution(RESIDUAL_WIDTH, 3, 1)(b, x, dtype), dtype))
    y = batch_norm(RESIDUAL_WIDTH)(b, convolution(RESIDUAL_WIDTH, 3, 1)(b, y, dtype), dtype)
    return b.relu(b.add(x, y))


def separable(b: Builder, x: Node, dtype: str) -> Node:
    """A pointwise convolution that widens, a depthwise one and a pointwise one that narrows, each with a norm; the input is added."""
    wide = 4 * SEPARABLE_WIDTH
    y = b.relu(batch_norm(wide)(b, pointwise(b, x, dtype, wide, SEPARABLE_WIDTH), dtype))
    y = b.relu(batch_norm(wide)(b, convolution(wide, 3, wide)(b, y, dtype), dtype))
    return b.add(x, batch_norm(SEPARABLE_WIDTH)(b, pointwise(b, y, dtype, SEPARABLE_WIDTH, wide), dtype))


def pointwise(b: Builder, x: Node, dtype: str, to: int, channels: int) -> Node:
    return b.convolution(x, weight(b, "k", dtype, to, channels, 1, 1), weight(b, "b", dtype, to), [1, 1], [0, 0], [1, 1], 1)


def tiny_pair(b: Builder, x: Node, dtype: str) -> Node:
    """Two nodes that do next to nothing, which no runtime fuses into one."""
    return b.softmax(square(TINY)(b, x, dtype), -1)


def lookup(b: Builder, x: Node, dtype: str) -> Node:
    return b.embedding(weight(b, "table", dtype, 4096, 384), x)


def permuted_copy(b: Builder, x: Node, dtype: str) -> Node:
    return b.clone(b.permute(x, [0, 2, 1, 3]), memory_format=torch.contiguous_format)


def sliced(b: Builder, x: Node, dtype: str) -> Node:
    return b.slice(x, 1, 1, 9223372036854775807)


def joined(b: Builder, x: Node, dtype: str) -> Node:
    return b.cat([x, x], 1)


BATCH, HEADS, TOKENS = 4, 6, 128
WARM_WIDTH, WARM_COUNT = 384, 12  # weights of 7 MB at f32: together more than a core's own cache, each less
TINY, TINY_ROWS, TINY_PAIRS = 8, 2, 16
NARROW, NARROW_COUNT, NARROW_ROWS = 64, 4, 4096
CONVOLVED, CONVOLVED_POSITIONS, NORMED_COUNT = 32, 8 * 28 * 28, 4
BLOCK_WIDTH, RESIDUAL_WIDTH, SEPARABLE_WIDTH = 384, 64, 32
LINEAR = tuple(
    Probe(f"linear{width}x{count}", "matrix", square(width), (width,), rows, count)
    for width, count, rows in (
        (32, 4, (1, 32, 1024)), (128, 4, (1, 16, 128, 1024)), (384, 4, (1, 8, 32, 64, 128, 256, 1024)), (1024, 2, (1, 8, 64, 256)),
    )
)  # fmt: skip
ROUNDED = tuple(
    Probe(f"{op[:4]}_{width}x{count}", op, rounded_square(op, width), (width,), rows, count, half=False, quick=quick, composite=True)
    for op in ("int8_linear", "int4_linear")
    for width, count, rows, quick in ((384, 3, (1, 64, 1024), True), (1024, 2, (1, 64), False))
)
ATTENTION = (
    Probe("attention1", "attention", attentions(), (1, HEADS, 64), (32, 128, 512), axis=2, idle_rows=1, quick=False),
    Probe("attention4", "attention", attentions(), (BATCH, HEADS, 64), (32, 128, 256), axis=2, idle_rows=1),
    Probe("packed4", "packed", packed_attention, (BATCH, 3 * HEADS * 64), (TOKENS,), axis=1, idle_rows=1, half=False),
    Probe("causal4", "attention.causal", attentions(True), (BATCH, HEADS, 64), (TOKENS, 256), axis=2, idle_rows=1),
    Probe("attention_long", "attention", attentions(), (1, HEADS, 64), (2048,), axis=2, idle_rows=1, quick=False),
)
CONVOLUTION = tuple(
    Probe(f"{curve}{channels}", curve, convolution(channels, taps, channels if depthwise else 1), (channels, side, side), rows, count, quick=quick)
    for curve, taps, depthwise in (
        ("convolution", 3, False), ("convolution.pointwise", 1, False), ("convolution.depthwise", 3, True),
    )
    for channels, side, count, rows, quick in ((32, 28, 2, (1, 8), True), (128, 14, 2, (1, 4), True), (96, 56, 3, (1,), False))
)  # fmt: skip
ROWS = (
    Probe("layer_norm", "layer_norm", norm(384), (384,), (8, 197, 1576), 3, serves=("row",)),
    Probe("softmax", "softmax", applied("softmax", -1), (HEADS, 128), (8, 256, 1024), 3, half=False),
    Probe("mean", "mean", lambda b, x, dtype: b.mean(x, [-1], True), (384,), (16, 1576), serves=("reduce",), half=False),
)
POINTWISE = (
    Probe("add", "elementwise", sums, (384,), (8, 197, 1576, 12608)),
    Probe("add_out", "add_out", sums, (384,), (1576,), narrowed=False, half=False),
    Probe("add_chain", "chain", sum_chain, (384,), (1576,), half=False),
    Probe("add_norm", "add_norm", norm_of_sum, (384,), (1576,), half=False),
    Probe("narrow", "matrix", square(NARROW), (NARROW,), (NARROW_ROWS,), NARROW_COUNT, half=False),
    Probe("linear_add", "linear_add", linear_and_sum, (NARROW,), (NARROW_ROWS,), half=False),
    Probe("batch_norm", "batch_norm", batch_norm(32), (32, 28, 28), (1, 8), 2),
    Probe("convolution_norm", "convolution_norm", convolution_and_norm, (CONVOLVED, 28, 28), (8,), half=False),
    Probe("gelu", "gelu", applied("gelu"), (384,), (8, 197, 1576), 2),
    Probe("tanh", "tanh", applied("tanh"), (384,), (197, 1576), 2, serves=("erf",), half=False),
    Probe("silu", "silu", applied("silu"), (384,), (197, 1576), 2, serves=("sigmoid", "softplus"), half=False),
    Probe("exp", "exp", applied("exp"), (384,), (197, 1576), 2, serves=("log", "cos", "sin"), half=False, quick=False),
)
MOVES = (
    Probe(
        "permute", "permute", lambda b, x, dtype: b.permute(x, [0, 2, 1, 3]), (TOKENS, HEADS, 64), (1, 8),
        serves=("transpose",), is_executed_view=True, narrowed=False,
    ),
    Probe(
        "slice", "slice", sliced, (TOKENS, 384), (1, 8),
        serves=("select", "split", "unbind", "expand"), is_executed_view=True, narrowed=False, half=False,
    ),
    Probe("clone", "clone", permuted_copy, (TOKENS, HEADS, 64), (1, 8), narrowed=False),
    Probe("cat", "copy", joined, (TOKENS, 384), (1, 8), half=False),
    Probe("embedding", "gather", lookup, (TOKENS,), (1, 8), integers=4096, half=False),
)  # fmt: skip
WARM = (Probe("warm", "warm", square(WARM_WIDTH), (WARM_WIDTH,), (1, 64), WARM_COUNT, half=False),)
WHOLES = (
    Probe("block", "block", block, (1, BLOCK_WIDTH), (16, 512), axis=1, is_whole=True),
    Probe("residual", "residual", residual, (RESIDUAL_WIDTH, 28, 28), (4,), is_whole=True),
    Probe("separable", "separable", separable, (SEPARABLE_WIDTH, 28, 28), (4,), is_whole=True),
)
PROBES = (*LINEAR, *WARM, *ROUNDED, *ATTENTION, *CONVOLUTION, *ROWS, *POINTWISE, *MOVES)
DISPATCH = Probe("dispatch", "dispatch", tiny_pair, (TINY,), (TINY_ROWS,), TINY_PAIRS, idle_rows=TINY_ROWS, ops=2)
GPU_PROBES = (
    Probe("linear4096", "matrix", square(4096), (4096,), (1, 128, 8192)),
    Probe("add_long", "elementwise", sums, (4096,), (4096, 65536)),
)
COLD_WIDTH = 1024
COLD_ROWS = (1, 32)


def cold_probe(nbytes: float, dtype: str) -> Probe:
    """Linears of more weights together than a cache of nbytes holds."""
    count = max(2, math.ceil(1.5 * nbytes / (COLD_WIDTH**2 * DTYPES[dtype].itemsize)))
    return Probe("cold", "cold", square(COLD_WIDTH), (COLD_WIDTH,), COLD_ROWS, count)


def panel(probes: tuple[Probe, ...], dtype: str, widen: bool, rows: int | None = None) -> Graph:
    """One graph that holds all these probes side by side, each with an input and an output of its own.

    widen: inputs and outputs are f32, for runtimes that take nothing else, and are cast to dtype and back inside. rows: of each axis that varies; None
    for a symbol of its own.
    """
    types = {
        f"x{place}": TensorType(
            _input_dtype(probe, dtype, widen), probe.sizes(rows or sympy.Symbol(f"m{place}", integer=True, positive=True))
        )
        for place, probe in enumerate(probes)
    }

    def function(b: Builder, **inputs: Node) -> list[Node]:
        results = []
        for probe, x in zip(probes, inputs.values(), strict=True):
            cast = widen and not probe.integers
            y = probe.body(b, b.to(x, dtype=DTYPES[dtype]) if cast else x, dtype)
            y = b.slice(y, -1, 0, 1) if probe.narrowed else y
            results.append(b.to(y, dtype=torch.float32) if widen else y)
        return results

    return build("panel", function, **types)


def _input_dtype(probe: Probe, dtype: str, widen: bool) -> str:
    if probe.integers:
        return "i64"
    return "f32" if widen else dtype


@cache
def static_graph(probe: Probe, rows: int, dtype: str) -> Graph:
    """One link of the probe's chain at so many rows, for its formulas; nothing runs, and constants have no values."""
    type_ = TensorType("i64" if probe.integers else dtype, probe.sizes(rows))
    with torch.device("meta"):
        return build(probe.name, lambda b, x: probe.link(b, x, dtype), x=type_)
