"""Fold an eval batch norm into the convolution or linear before it.

batch_norm(conv(x, W, b), mean, var, g, c)  ->  conv(x, W * s, (b - mean) * s + c),   s = g / sqrt(var + eps) per output channel

Exact up to rounding, in float64 while folding; also for transposed, grouped and depthwise convolutions and for linears of two axes.
One pass over the activation and one launch less for each pair. Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.batch_norm import affine
from paretorch.rewrites.block_fusion.weights import argument, derive, held, is_fixed, only_user, short, wide
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fold_conv_batch_norm"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "batch_norm") and is_op(node.args[0], "convolution", "conv_transpose", "linear"):
            reason = _refuses(graph, node)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _refuses(graph: Graph, norm: Node) -> str | None:
    conv: Node = norm.args[0]  # type: ignore[assignment]
    a = arguments(norm)
    if only_user(conv) is None:
        return f"{conv.name} has {len(conv.users)} users; the others need it before the norm"
    if a["training"] or a["running_mean"] is None or a["running_var"] is None:
        return "the batch norm takes its statistics from the batch, so it is no fixed scale and shift"
    if not is_fixed(graph, argument(conv, 1), argument(conv, 2), a["weight"], a["bias"], a["running_mean"], a["running_var"]):
        return f"a weight of {conv.name} or a statistic of {norm.name} is no constant of the graph, so it may change between calls"
    if is_op(conv, "linear") and len(shape_of(conv)) != 2:
        return f"the norm's channels are axis 1 of {len(shape_of(conv))}, the linear's outputs are the last"
    return None


def scaled(weight: Tensor, scale: Tensor, conv: Node) -> Tensor:
    """The weight of a convolution or linear whose output channels are multiplied by scale."""
    if not (is_op(conv, "conv_transpose") or arguments(conv).get("transposed")):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))  # [C_out, C_in / groups, ...]
    groups = int(arguments(conv)["groups"])
    per_group = weight.view(groups, -1, *weight.shape[1:])  # [C_in, C_out / groups, ...] in groups of input channels
    return (per_group * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    norm = graph.node(site.name)
    assert norm is not None and isinstance(norm.args[0], Node)  # sites said so  # noqa: PT018
    conv, a = norm.args[0], arguments(norm)
    old_weight, old_bias = argument(conv, 1), argument(conv, 2)
    weight, bias = wide(graph, old_weight), wide(graph, old_bias)
    assert weight is not None  # sites said so
    scale, shift = affine(graph, norm)
    sources = held(graph, old_weight, old_bias, a["weight"], a["bias"], a["running_mean"], a["running_var"])
    what = (NAME, conv.target, bias is None, a["weight"] is None, a["eps"], arguments(conv).get("groups"))
    b = Builder(graph, norm, origin=origin_of(conv), rule=NAME, site=site.name)
    name = f"{short(old_weight)}_folded"
    folded = derive(b, name, what, sources, lambda: scaled(weight, scale, conv))
    folded_bias = derive(b, f"{name}_bias", (*what, "bias"), sources, lambda: shift if bias is None else bias * scale + shift)
    others = {key: value for key, value in conv.kwargs.items() if key not in ("weight", "bias")}
    graph.replace(norm, b.call(conv.target, (conv.args[0], folded, folded_bias, *conv.args[3:]), others))
    return graph.clean()


def example(batch: int = 2, channels: int = 3) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    def body(b: Builder, x: Node) -> Node:
        conv = b.convolution(x, b.constant("weight", draw(4, channels, 3, 3)), None, [1, 1], [1, 1])
        gain, shift, mean = (b.constant(name, draw(4)) for name in ("gain", "shift", "mean"))
        return b.batch_norm(conv, gain, shift, mean, b.constant("variance", draw(4).square() + 0.5), False, 0.1, 1e-5, False)

    return build("conv_norm", body, x=TensorType("f32", (batch, channels, 6, 6)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches"), source="arXiv:1712.05877", example=example,
    sites=sites, rewrite=rewrite,
)  # fmt: skip
