"""Fold the scale and shift of a norm into the linears that read it.

linear(layer_norm(x) * g + c, W, b)  ->  linear(layer_norm(x), W * g, b + W @ c);   rms_norm the same without c

Exact up to rounding. The norm then reads no weights; on its own it saves little, but it lets equal norms be shared and weights be merged.
Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import argument, derive, held, holders, is_fixed, short, wide
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
    a = arguments(norm)
    if len(a["normalized_shape"]) != 1:
        return f"it normalises {len(a['normalized_shape'])} axes; a linear scales only the last"
    if not is_fixed(graph, a["weight"], a.get("bias")):
        return "its scale or shift is no constant of the graph, so it may change between calls"
    for user in norm.users:
        if not is_fixed(graph, argument(user, 1), argument(user, 2)):
            return f"the weight or bias of {user.name} is no constant of the graph"
        alone = [holder for holder in holders(graph, argument(user, 1)) if not is_op(holder, "linear")]
        if alone:
            kind = tensor_type(argument(user, 1))
            return f"{alone[0].name} shares the weight {kind} of {user.name}; a scaled copy would be kept beside it"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    norm = graph.node(site.name)
    assert norm is not None  # sites said so
    a = arguments(norm)
    gain, shift = wide(graph, a["weight"]), wide(graph, a.get("bias"))
    assert gain is not None  # sites said so
    for linear in list(norm.users):
        b = Builder(graph, linear, origin=origin_of(linear), rule=NAME, site=site.name)
        _, weight, bias = arguments(linear).values()
        rows = wide(graph, weight)
        assert rows is not None  # sites said so
        sources = held(graph, weight, a["weight"], a.get("bias"), bias)
        args = [norm, derive(b, f"{short(weight)}_scaled", NAME, sources[:2], partial(_scaled, rows, gain))]
        if shift is not None or bias is not None:
            make = partial(_shifted, rows, shift, wide(graph, bias))
            args.append(derive(b, f"{short(weight)}_shifted_bias", (NAME, shift is None), sources, make))
        graph.replace(linear, b.linear(*args))
    norm.args = (*norm.args[:2], None, None, a["eps"]) if is_op(norm, "layer_norm") else (*norm.args[:2], None, a["eps"])
    norm.kwargs = {}
    return graph.clean()


def _scaled(weight: Tensor, gain: Tensor) -> Tensor:
    return weight * gain


def _shifted(weight: Tensor, shift: Tensor | None, bias: Tensor | None) -> Tensor:
    """At least one of shift and bias is there."""
    passed = weight @ shift if shift is not None else torch.zeros_like(weight[:, 0])
    return passed if bias is None else passed + bias


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
