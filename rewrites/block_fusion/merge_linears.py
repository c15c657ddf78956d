"""Merge two linears with nothing between them into one, where that needs fewer operations: adapters, factored projections.

linear(linear(x, A, a), B, b)  ->  linear(x, B A, B a + b)

Exact up to rounding; the product of the weights is taken in float64. A narrow middle (a low rank kept on purpose) is left alone, since
the merged weight would be larger than the two. Source: Hu et al. 2022, arXiv:2106.09685, section 4.1 (merging adapters).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import derive, held, short, wide
from paretorch.rewrites.match import Match, Value
from paretorch.rewrites.rule import Exact, Rule

NAME = "merge_linears"


def pattern(b: Builder, x: Value, inner: Value, inner_bias: Value | None, outer: Value, outer_bias: Value | None) -> Value:
    return b.linear(b.linear(x, inner, inner_bias), outer, outer_bias)


def legality(m: Match) -> str | None:
    for node in (m.inner, m.inner_bias, m.outer, m.outer_bias):
        if node is not None and wide(m.graph, node) is None:
            return f"{node.name} is no constant of the graph, so it may change between calls"
    (middle, width), (rows, _) = shape_of(m.inner), shape_of(m.outer)
    if rows * width >= middle * (rows + width):
        return f"one weight of {rows}x{width} takes no fewer operations than {middle}x{width} and {rows}x{middle}"
    return None


def replacement(b: Builder, m: Match) -> Value:
    inner, outer, inner_bias, outer_bias = (wide(m.graph, node) for node in (m.inner, m.outer, m.inner_bias, m.outer_bias))
    assert inner is not None and outer is not None  # legality said so  # noqa: PT018
    what = (NAME, inner_bias is None)
    sources = held(m.graph, m.inner, m.outer, m.inner_bias, m.outer_bias)
    args = [m.x, derive(b, f"{short(m.inner)}_merged", (*what, "weight"), sources[:2], lambda: outer @ inner)]
    if inner_bias is not None or outer_bias is not None:
        args.append(derive(b, f"{short(m.inner)}_merged_bias", (*what, "bias"), sources, lambda: _bias(outer, inner_bias, outer_bias)))
    return b.linear(*args)


def _bias(outer: Tensor, inner_bias: Tensor | None, outer_bias: Tensor | None) -> Tensor:
    """At least one of the biases is there."""
    passed = outer @ inner_bias if inner_bias is not None else torch.zeros_like(outer[:, 0])
    return passed if outer_bias is None else passed + outer_bias


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        one, two = (b.constant(name, torch.randn(shape, generator=chance)) for name, shape in (("one", (8, width)), ("two", (4, 8))))
        biases = [b.constant(f"{name}_bias", torch.randn(rows, generator=chance)) for name, rows in (("one", 8), ("two", 4))]
        return b.linear(b.linear(x, one, biases[0]), two, biases[1])

    return build("linears", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("flops", "bytes", "launches"), source="arXiv:2106.09685", example=example,
    pattern=pattern, legality=legality, replacement=replacement,
)  # fmt: skip
