"""Fold the scale and shift of a norm into the linears that read it.

linear(layer_norm(x) * g + c, W, b)  ->  linear(layer_norm(x), W * g, b + W @ c);   rms_norm the same without c

Exact up to rounding. The norm then reads no weights; on its own it saves little, but it lets equal norms be shared and weights be merged.
Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import argument, put, wide
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fold_norm_affine"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "layer_norm", "rms_norm") and argument(node, 2) is not None and any(is_op(user, "linear") for user in node.users):
            reason = _refuses(graph, node)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _refuses(graph: Graph, norm: Node) -> str | None:
    other = next((user for user in norm.users if not is_op(user, "linear") or user.args[0] is not norm), None)
    if other is not None:
        return f"{other.name} reads the norm as well and is no linear"
    if len(arguments(norm)["normalized_shape"]) != 1:
        return f"it normalises {len(arguments(norm)['normalized_shape'])} axes; a linear scales only the last"
    vectors = [value for value in (argument(norm, 2), argument(norm, 3) if is_op(norm, "layer_norm") else None) if value is not None]
    if any(wide(graph, value) is None for value in vectors):
        return "its scale or shift is no constant of the graph, so it may change between calls"
    for user in norm.users:
        if wide(graph, user.args[1]) is None or (argument(user, 2) is not None and wide(graph, user.args[2]) is None):
            return f"the weight or bias of {user.name} is no constant of the graph"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.copy()
    norm = graph.node(site.name)
    assert norm is not None  # sites said so
    gain = wide(graph, norm.args[2])
    shift = wide(graph, argument(norm, 3)) if is_op(norm, "layer_norm") else None
    assert gain is not None  # sites said so
    for linear in list(norm.users):
        b = Builder(graph, linear, origin=origin_of(linear), rule=NAME, site=site.name)
        weight, held, bias = wide(graph, linear.args[1]), graph.constant(linear.args[1]), wide(graph, argument(linear, 2))
        assert weight is not None and held is not None  # sites said so  # noqa: PT018
        offset = bias if shift is None else weight @ shift + (bias if bias is not None else 0.0)
        name = str(linear.args[1].target).replace(".", "_")  # type: ignore[union-attr]
        args = [norm, put(b, f"{name}_scaled", weight * gain, held)]
        args += [put(b, f"{name}_scaled_bias", offset, held)] if offset is not None else []
        graph.replace(linear, b.linear(*args))
    eps = arguments(norm)["eps"]
    norm.args = (*norm.args[:2], None, None, eps) if is_op(norm, "layer_norm") else (*norm.args[:2], None, eps)
    norm.kwargs = {}
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        gain, shift = (b.constant(name, torch.randn(width, generator=chance)) for name in ("gain", "shift"))
        weight = b.constant("weight", torch.randn(4, width, generator=chance))
        return b.linear(b.layer_norm(x, [width], gain, shift, 1e-5), weight, b.constant("bias", torch.randn(4, generator=chance)))

    return build("norm_linear", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes",), source="arXiv:2401.15024", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
