"""Spell an eval batch norm that no convolution precedes as one scale and one shift.

batch_norm(x, mean, var, g, c)  ->  x * s + t,   s = g / sqrt(var + eps),  t = c - mean * s, per channel

Exact up to rounding. Two pointwise ops join what stands before and after, and the scale may fold into a neighbour; the price decides.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, shape_of, tensor_type
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.batch_norm import affine
from paretorch.rewrites.block_fusion.weights import derive, held, is_fixed
from paretorch.rewrites.match import Const, Match, Value
from paretorch.rewrites.rule import Exact, Rule

NAME = "fold_batch_norm_affine"


def pattern(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, variance: Value | None, training: bool,
    momentum: Const, eps: float, cudnn: Const,
) -> Value:  # fmt: skip
    return b.batch_norm(x, weight, bias, mean, variance, training, momentum, eps, cudnn)


def legality(m: Match) -> str | None:
    if m.training or m.mean is None or m.variance is None:
        return "the batch norm takes its statistics from the batch, so it is no fixed scale and shift"
    if not is_fixed(m.graph, m.weight, m.bias, m.mean, m.variance):
        return "a weight or statistic is no constant of the graph, so it may change between calls"
    if tensor_type(m.x).dtype != tensor_type(m.mean).dtype:
        return f"x is {tensor_type(m.x)}, the statistics are {tensor_type(m.mean)}; the norm's dtypes are its own"
    return None


def replacement(b: Builder, m: Match) -> Value:
    scale, shift = affine(m.graph, m.root)
    channels = [-1, *[1] * (len(shape_of(m.x)) - 2)]
    sources = held(m.graph, m.mean, m.variance, m.weight, m.bias)
    what = (NAME, m.weight is None, m.eps, len(channels))
    by = derive(b, f"{m.root.name}_scale", (*what, "scale"), sources, lambda: scale.view(channels))
    to = derive(b, f"{m.root.name}_shift", (*what, "shift"), sources, lambda: shift.view(channels))
    return b.add(b.mul(m.x, by), to)


def example(batch: int = 2, channels: int = 3) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(channels, generator=chance)

    def body(b: Builder, x: Node) -> Node:
        gain, shift, mean = (b.constant(name, draw()) for name in ("gain", "shift", "mean"))
        return b.relu(b.batch_norm(x, gain, shift, mean, b.constant("variance", draw().square() + 0.5), False, 0.1, 1e-5, False))

    return build("norm", body, x=TensorType("f32", (batch, channels, 4, 4)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("flops",), source="arXiv:1712.05877", example=example, pattern=pattern,
    legality=legality, replacement=replacement,
)  # fmt: skip
