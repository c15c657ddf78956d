"""Fold a constant that is added to a linear's output into its bias.

linear(x, W, b) + c  ->  linear(x, W, b + c)          c: a number or a constant of the last axis

Exact up to rounding. One pass over the activation less. Source: none needed; the sum of two constants.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, shape_of, tensor_type
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import derive, held, short, wide
from paretorch.rewrites.match import Match, Value, Weight
from paretorch.rewrites.rule import Exact, Rule

NAME = "fold_shift"


def pattern(b: Builder, x: Value, weight: Value, bias: Value | None, shift: Weight | float) -> Value:
    return b.add(b.linear(x, weight, bias), shift)


def legality(m: Match) -> str | None:
    if wide(m.graph, m.weight) is None or (m.bias is not None and wide(m.graph, m.bias) is None):
        return "the weight or bias of the linear is no constant of the graph, so it may change between calls"
    width = shape_of(m.root)[-1]
    if isinstance(m.shift, Node) and (wide(m.graph, m.shift) is None or shape_of(m.shift) not in ((), (1,), (width,))):
        return f"the shift is {tensor_type(m.shift)}; only one number per output channel, of f32[{width}], folds into the bias"
    if shape_of(m.root) != (*shape_of(m.x)[:-1], shape_of(m.weight)[0]) or tensor_type(m.root).dtype != tensor_type(m.weight).dtype:
        return f"the sum is {tensor_type(m.root)}, of another type than the linear's output"
    return None


def replacement(b: Builder, m: Match) -> Value:
    shift, bias = wide(m.graph, m.shift), wide(m.graph, m.bias)
    number = None if isinstance(m.shift, Node) else float(m.shift)
    rows = shape_of(m.weight)[0]

    def total() -> torch.Tensor:
        added = shift if shift is not None else torch.tensor(number, dtype=torch.float64)
        return (bias if bias is not None else torch.zeros(rows, dtype=torch.float64)) + added

    sources = held(m.graph, m.weight, m.bias, m.shift)
    shifted = derive(b, f"{short(m.weight)}_shifted_bias", (NAME, number, bias is None), sources, total)
    return b.linear(m.x, m.weight, shifted)


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        weight, bias = b.constant("weight", torch.randn(6, width, generator=chance)), b.constant("bias", torch.randn(6, generator=chance))
        return b.add(b.linear(x, weight, bias), b.constant("shift", torch.randn(6, generator=chance)))

    return build("shift", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches", "flops"), source="arithmetic", example=example,
    pattern=pattern, legality=legality, replacement=replacement,
)  # fmt: skip
