"""Pack linears that read the same value into one, and split its output: query, key and value; gate and up.

linear(x, A), linear(x, B), …  ->  split(linear(x, [A; B; …]))

Exact up to rounding. One product with more columns reaches a better rate than several, and x is read once. Whether it pays depends on what the
runtime does with the split: the price decides.
Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, origin_of, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import argument
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "pack_linears"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.nodes:
        group = [user for user in node.users if is_op(user, "linear") and user.args[0] is node]
        if len(group) < 2:
            continue
        fixed = [user for user in group if graph.constant(user.args[1]) is not None and _bias_is_known(graph, user)]
        if len(fixed) < 2:
            yield Refusal(NAME, group[0].name, f"the weights of {len(group) - len(fixed)} of {len(group)} linears are no constants of the graph")
        elif len({graph.constant(user.args[1]).dtype for user in fixed}) > 1:  # type: ignore[union-attr]
            yield Refusal(NAME, group[0].name, "the weights have several dtypes")
        else:
            yield Site("+".join(user.name for user in fixed), origin_of(fixed[0]).path)


def _bias_is_known(graph: Graph, linear: Node) -> bool:
    bias = argument(linear, 2)
    return bias is None or graph.constant(bias) is not None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.copy()
    group = [node for name in site.name.split("+") if (node := graph.node(name)) is not None]
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = min(group, key=order.__getitem__)
    b = Builder(graph, first, origin=origin_of(first), rule=NAME, site=site.name)
    weights = [graph.constant(linear.args[1]) for linear in group]
    rows = [weight.shape[0] for weight in weights if weight is not None]
    args = [first.args[0], b.constant(f"{first.name}_packed", torch.cat([w for w in weights if w is not None]))]
    if any(argument(linear, 2) is not None for linear in group):
        zeros = [torch.zeros(count, dtype=weights[0].dtype) for count in rows]  # type: ignore[union-attr]
        held = [graph.constant(argument(linear, 2)) for linear in group]
        biases = [zero if bias is None else bias for bias, zero in zip(held, zeros, strict=True)]
        args.append(b.constant(f"{first.name}_packed_bias", torch.cat(biases)))
    packed = b.linear(*args)
    start, last = 0, len(shape_of(packed)) - 1
    for linear, count in zip(group, rows, strict=True):
        graph.replace(linear, b.slice(packed, last, start, start + count))
        start += count
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> tuple[Node, Node]:
        one, two = (b.constant(name, torch.randn(rows, width, generator=chance)) for name, rows in (("one", 4), ("two", 6)))
        return b.linear(x, one), b.linear(x, two, b.constant("bias", torch.randn(6, generator=chance)))

    return build("parallel", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("launches",), source="arXiv:1909.08053", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
