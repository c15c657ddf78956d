"""Small transformers as graphs, for the examples of rules that need whole layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    tokens: int = 9
    width: int = 8
    heads: int = 2
    layers: int = 2
    causal: bool = False


def transformer(sizes: Sizes | None = None, dtype: str = "f32") -> Graph:
    """A pre-norm transformer: x: T[B,T,C] -> T[B,C], the last norm's first token (its last one if causal)."""
    sizes = sizes or Sizes()
    shape = TensorType(dtype, (sizes.batch, sizes.tokens, sizes.width))
    return build("transformer", lambda b, x: _model(b, x, sizes), x=shape)


def _model(b: Builder, x: Node, sizes: Sizes) -> Node:
    return b.select(layers(b, x, sizes), 1, sizes.tokens - 1 if sizes.causal else 0)


def layers(b: Builder, x: Node, sizes: Sizes) -> Node:
    """T[B,T,C] -> T[B,T,C]: the layers of a pre-norm transformer and its last norm."""
    weights = _Weights(b, sizes.width, x.meta["val"].dtype)
    for layer in range(sizes.layers):
        x = _layer(b, x, weights, layer, sizes)
    return weights.norm(x, "norm")


def gated_transformer(sizes: Sizes | None = None, dtype: str = "f32") -> Graph:
    """As `transformer`, with a gate in front of the second layer on whose score a mask of all later attention stands; the first token stays."""
    sizes = sizes or Sizes()

    def model(b: Builder, x: Node) -> Node:
        weights = _Weights(b, sizes.width, x.meta["val"].dtype)
        x = _layer(b, x, weights, 0, sizes)
        score = b.select(weights.linear(weights.norm(x, "gate_norm"), "gate", 1, sizes.width), 2, 0)
        first = b.constant("first", torch.arange(sizes.tokens) == 0)
        stays = b.logical_or(b.call(torch.ops.aten.gt.Scalar, (score, 0)), first)
        mask = b.unsqueeze(b.unsqueeze(b.call(torch.ops.aten.where.Scalar, (stays, 0.0, -1e9)), 1), 2)
        for layer in range(1, sizes.layers + 1):
            x = _layer(b, x, weights, layer, sizes, mask)
        return b.select(weights.norm(x, "norm"), 1, 0)

    return build("gated_transformer", model, x=TensorType(dtype, (sizes.batch, sizes.tokens, sizes.width)))


def _layer(b: Builder, x: Node, weights: _Weights, layer: int, sizes: Sizes, mask: Node | None = None) -> Node:
    x = b.add(x, _attend(b, weights.norm(x, f"layer{layer}_norm1"), weights, f"layer{layer}", sizes, mask))
    grown = b.gelu(weights.linear(weights.norm(x, f"layer{layer}_norm2"), f"layer{layer}_grow", 2 * sizes.width, sizes.width))
    return b.add(x, weights.linear(grown, f"layer{layer}_shrink", sizes.width, 2 * sizes.width))


def _attend(b: Builder, x: Node, weights: _Weights, name: str, sizes: Sizes, mask: Node | None = None) -> Node:
    batch, tokens, width, heads = sizes.batch, sizes.tokens, sizes.width, sizes.heads
    query, key, value = (
        b.permute(b.view(weights.linear(x, f"{name}_{part}", width, width), [batch, tokens, heads, width // heads]), [0, 2, 1, 3])
        for part in ("query", "key", "value")
    )
    masked = () if mask is None else (mask,)
    mixed = b.attention(query, key, value, *masked, scale=(width // heads) ** -0.5, right=0 if sizes.causal else -1)
    joined = b.call(torch.ops.aten.reshape.default, (b.permute(mixed, [0, 2, 1, 3]), [batch, tokens, width]))
    return weights.linear(joined, f"{name}_project", width, width)


class _Weights:
    """Constants, each drawn from a generator of its own, so that one more changes no other."""

    def __init__(self, b: Builder, width: int, dtype: torch.dtype) -> None:
        self.b, self.width, self.dtype, self.count = b, width, dtype, 0

    def draw(self, *shape: int) -> Tensor:
        self.count += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.count), dtype=torch.float64).to(self.dtype)

    def linear(self, x: Node, name: str, to: int, width: int) -> Node:
        weight = self.b.constant(f"{name}_weight", self.draw(to, width) * width**-0.5)
        return self.b.linear(x, weight, self.b.constant(f"{name}_bias", self.draw(to)))

    def norm(self, x: Node, name: str) -> Node:
        weight, bias = 1 + 0.1 * self.draw(self.width), 0.1 * self.draw(self.width)
        return self.b.layer_norm(x, [self.width], self.b.constant(f"{name}_weight", weight), self.b.constant(f"{name}_bias", bias))
