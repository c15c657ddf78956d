"""Fold an eval batch norm into the convolution before it.

batch_norm(conv(x, W, b), mean, var, g, c)  ->  conv(x, W * s, (b - mean) * s + c),   s = g / sqrt(var + eps) per output channel

Exact up to rounding, in float64 while folding. One pass over the activation and one launch less for each pair.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
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
from paretorch.rewrites.block_fusion.weights import argument, only_user, put, wide
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fold_conv_batch_norm"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "batch_norm") and is_op(node.args[0], "convolution", "conv_transpose"):
            reason = _refuses(graph, node)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _refuses(graph: Graph, norm: Node) -> str | None:
    conv: Node = norm.args[0]  # type: ignore[assignment]
    if only_user(conv) is None:
        return f"{conv.name} has {len(conv.users)} users; the others need it before the norm"
    if arguments(norm)["training"]:
        return "the batch norm is in training mode; its statistics depend on the batch"
    statistics = [value for value in norm.args[1:5] if value is not None]
    if wide(graph, conv.args[1]) is None or any(wide(graph, value) is None for value in statistics):
        return "a weight or statistic is no constant of the graph, so it may change between calls"
    if argument(conv, 2) is not None and wide(graph, conv.args[2]) is None:
        return "the convolution's bias is no constant of the graph"
    if is_op(conv, "conv_transpose") and arguments(conv)["groups"] != 1:
        return f"a transposed convolution in {arguments(conv)['groups']} groups has no output channel axis to scale"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.copy()
    norm = graph.node(site.name)
    assert norm is not None and isinstance(norm.args[0], Node)  # sites said so  # noqa: PT018
    conv, a = norm.args[0], arguments(norm)
    weight, held = wide(graph, conv.args[1]), graph.constant(conv.args[1])
    mean, variance = wide(graph, a["running_mean"]), wide(graph, a["running_var"])
    assert weight is not None and held is not None and mean is not None and variance is not None  # noqa: PT018
    gain, shift, bias = wide(graph, a["weight"]), wide(graph, a["bias"]), wide(graph, argument(conv, 2))
    scale = (variance + a["eps"]).rsqrt() * (gain if gain is not None else 1.0)
    channel = 1 if is_op(conv, "conv_transpose") else 0
    shape = [-1 if axis == channel else 1 for axis in range(weight.ndim)]
    offset = (bias if bias is not None else torch.zeros_like(mean)) - mean
    folded = offset * scale + (shift if shift is not None else 0.0)
    b = Builder(graph, norm, origin=origin_of(conv), rule=NAME, site=site.name)
    name = str(conv.args[1].target).replace(".", "_")  # type: ignore[union-attr]
    new_weight, new_bias = put(b, f"{name}_folded", weight * scale.view(shape), held), put(b, f"{name}_folded_bias", folded, held)
    graph.replace(norm, b.call(conv.target, (conv.args[0], new_weight, new_bias, *conv.args[3:]), dict(conv.kwargs)))
    return graph.clean()


def example(batch: int = 2, channels: int = 3) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance)

    def body(b: Builder, x: Node) -> Node:
        conv = b.convolution(x, b.constant("weight", draw(4, channels, 3, 3)), None, [1, 1], [1, 1])
        names = ("gain", "shift", "mean")
        gain, shift, mean = (b.constant(name, draw(4)) for name in names)
        return b.batch_norm(conv, gain, shift, mean, b.constant("variance", draw(4).square() + 0.5), False, 0.1, 1e-5, False)

    return build("conv_norm", body, x=TensorType("f32", (batch, channels, 6, 6)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches"), source="arXiv:1712.05877", example=example,
    sites=sites, rewrite=rewrite,
)  # fmt: skip
