"""Fuse a residual addition with the norm of the sum, in one op that gives both.

layer_norm(x + y), x + y  ->  add_layer_norm(x, y);   rms_norm(x + y), x + y  ->  add_rms_norm(x, y)

Exact. The sum is written once and never read again by the norm: four passes over the activation where there were five, and one launch less.
A fusion of our own kernels: torch and ONNX runtimes see through the op and are no faster for it. Source: Hsu et al. 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, tensor_type
from paretorch.ir.types import TensorType
from paretorch.rewrites.match import Const, Match, Value
from paretorch.rewrites.rule import Exact, Rule


def layer_pattern(
    b: Builder, x: Value, residual: Value, shape: Const, weight: Value | None, bias: Value | None, eps: float, fast: Const
) -> tuple[Value, Value]:
    total = b.add(x, residual)
    return b.layer_norm(total, shape, weight, bias, eps, fast), total


def rms_pattern(b: Builder, x: Value, residual: Value, shape: Const, weight: Value | None, eps: Const) -> tuple[Value, Value]:
    total = b.add(x, residual)
    return b.rms_norm(total, shape, weight, eps), total


def legality(m: Match) -> str | None:
    if tensor_type(m.x) != tensor_type(m.residual):
        return f"{m.x.name} is {tensor_type(m.x)} and {m.residual.name} is {tensor_type(m.residual)}; one kernel reads two of one type"
    if len(m.shape) != 1:
        return f"it normalises {len(m.shape)} axes; one kernel normalises the last"
    return None


def layer_replacement(b: Builder, m: Match) -> tuple[Value, Value]:
    both = b.add_layer_norm(m.x, m.residual, m.shape, m.weight, m.bias, m.eps)
    return b.item(both, 0), b.item(both, 1)


def rms_replacement(b: Builder, m: Match) -> tuple[Value, Value]:
    both = b.add_rms_norm(m.x, m.residual, m.shape, m.weight, m.eps)
    return b.item(both, 0), b.item(both, 1)


def example(batch: int = 2, width: int = 8, *, rms: bool = False) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node, y: Node) -> tuple[Node, Node]:
        total = b.add(x, y)
        weight = b.constant("weight", torch.randn(width, generator=chance))
        if rms:
            return b.add(total, b.rms_norm(total, [width], weight, 1e-6)), total
        bias = b.constant("bias", torch.randn(width, generator=chance))
        return b.add(total, b.layer_norm(total, [width], weight, bias, 1e-5)), total

    kind = TensorType("f32", (batch, 3, width))
    return build("residual", body, x=kind, y=kind)


LAYER = Rule(
    name="fuse_residual_layer_norm", family="block_fusion", effect=Exact(), saves=("bytes", "launches"), source="arXiv:2410.10989",
    example=example, pattern=layer_pattern, legality=legality, replacement=layer_replacement,
)  # fmt: skip
RMS = Rule(
    name="fuse_residual_rms_norm", family="block_fusion", effect=Exact(), saves=("bytes", "launches"), source="arXiv:2410.10989",
    example=partial(example, rms=True), pattern=rms_pattern, legality=legality, replacement=rms_replacement,
)  # fmt: skip
