"""Fold a constant scale of a linear's output into its weights (LayerScale).

linear(x, W, b) * g   ->  linear(x, W * g, b * g)          g: a number or a constant of the last axis; division the same

Exact up to rounding. One pass over the activation less. Source: Touvron et al. 2021, arXiv:2103.17239 (LayerScale).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import argument, derive, held, is_fixed, only_user, short, wide
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fold_scale"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "mul", "div") and any(is_op(arg, "linear") for arg in node.args):
            linear, scale = _parts(graph, node)
            if linear is None:
                continue
            reason = _refuses(graph, node, linear, scale)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _parts(graph: Graph, node: Node) -> tuple[Node | None, Any]:
    """(linear, scale) of a product of a linear with a number or a constant."""
    left, right = node.args[0], node.args[1]
    if is_op(left, "linear") and (isinstance(right, (int, float)) or graph.constant(right) is not None):
        return left, right  # type: ignore[return-value]
    if is_op(node, "mul") and is_op(right, "linear") and graph.constant(left) is not None:
        return right, left  # type: ignore[return-value]
    return None, None


def _refuses(graph: Graph, node: Node, linear: Node, scale: Any) -> str | None:
    if only_user(linear) is None:
        return f"{linear.name} has {len(linear.users)} users; the others need it unscaled"
    vector = wide(graph, scale)
    width = shape_of(linear)[-1]
    if isinstance(scale, Node) and (vector is None or vector.numel() not in (1, width) or vector.shape[-1:] not in ((), (vector.numel(),))):
        return f"the scale is {tensor_type(scale)}; only one factor per output channel of f32[{width}] folds into the weights"
    if not is_fixed(graph, argument(linear, 1), argument(linear, 2)):
        return f"the weight or bias of {linear.name} is no constant of the graph, so it may change between calls"
    if tensor_type(node) != tensor_type(linear):
        return f"the product has type {tensor_type(node)}, the linear {tensor_type(linear)}"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    node = graph.node(site.name)
    assert node is not None  # sites said so
    linear, scale = _parts(graph, node)
    assert linear is not None  # sites said so
    x, weight_node, bias_node = list(arguments(linear).values())
    vector, weight, bias = wide(graph, scale), wide(graph, weight_node), wide(graph, bias_node)
    factor = vector.reshape(-1) if vector is not None else torch.tensor([float(scale)], dtype=torch.float64)
    factor = factor.reciprocal() if is_op(node, "div") else factor
    assert weight is not None  # sites said so
    what = (NAME, is_op(node, "div"), None if vector is not None else float(scale))
    sources = held(graph, weight_node, scale)
    b = Builder(graph, node, origin=origin_of(linear), rule=NAME, site=site.name)
    args = [x, derive(b, f"{short(weight_node)}_times", what, sources, lambda: weight * factor[:, None])]
    if bias is not None:
        args.append(derive(b, f"{short(bias_node)}_times", what, held(graph, bias_node, scale), lambda: bias * factor))
    graph.replace(node, b.linear(*args))
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        weight, bias = b.constant("weight", torch.randn(6, width, generator=chance)), b.constant("bias", torch.randn(6, generator=chance))
        return b.mul(b.linear(x, weight, bias), b.constant("scale", torch.randn(6, generator=chance)))

    return build("layer_scale", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches", "flops"), source="arXiv:2103.17239", example=example,
    sites=sites, rewrite=rewrite,
)  # fmt: skip
