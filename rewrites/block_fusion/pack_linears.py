"""Pack linears that read the same value into one, and split its output: query, key and value; gate and up.

linear(x, A), linear(x, B), …  ->  split(linear(x, [A; B; …]))

Exact up to rounding. One product with more columns reaches a better rate than several, and x is read once. Parts may differ in width (grouped
heads) and in having a bias, absent ones being zeros. Whether it pays depends on what the runtime does with the slices: the price decides.
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
from paretorch.rewrites.block_fusion.weights import argument, derive, held, is_fixed, restride, short
from paretorch.rewrites.rule import JOIN, Exact, Knob, Refusal, Rule, Site

NAME = "pack_linears"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.nodes:
        group = [user for user in node.users if is_op(user, "linear") and user.args[0] is node]
        if len(group) < 2:
            continue
        fixed = [user for user in group if graph.constant(user.args[1]) is not None and is_fixed(graph, argument(user, 2))]
        if len(fixed) < 2:
            unknown = f"{len(group) - len(fixed)} of {len(group)} linears"
            yield Refusal(NAME, group[0].name, f"the weights of {unknown} are no constants of the graph")
        elif len({graph.constant(user.args[1]).dtype for user in fixed}) > 1:  # type: ignore[union-attr]
            yield Refusal(NAME, group[0].name, "the weights have several dtypes")
        else:
            yield Site(JOIN.join(user.name for user in fixed), origin_of(fixed[0]).path)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    group = [node for name in site.parts if (node := graph.node(name)) is not None]
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = min(group, key=order.__getitem__)
    b = Builder(graph, first, origin=origin_of(first), rule=NAME, site=site.name)
    weights = held(graph, *(argument(linear, 1) for linear in group))
    rows = [weight.shape[0] for weight in weights]
    biases = [graph.constant(argument(linear, 2)) for linear in group]
    known = [bias for bias in biases if bias is not None]
    name = short(argument(first, 1))
    args = [first.args[0], derive(b, f"{name}_packed", NAME, weights, lambda: torch.cat(weights))]
    if known:
        parts = [torch.zeros(count, dtype=weights[0].dtype) if bias is None else bias for bias, count in zip(biases, rows, strict=True)]
        what = (NAME, tuple(count if bias is None else None for bias, count in zip(biases, rows, strict=True)))
        args.append(derive(b, f"{name}_packed_bias", what, known, lambda: torch.cat(parts)))
    packed = b.linear(*args)
    start, last, slices = 0, len(shape_of(packed)) - 1, []
    for linear, count in zip(group, rows, strict=True):
        slices.append(b.slice(packed, last, start, start + count))
        graph.replace(linear, slices[-1])
        start += count
    graph.clean()
    restride(graph, slices)
    return graph


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> tuple[Node, Node]:
        one, two = (b.constant(name, torch.randn(rows, width, generator=chance)) for name, rows in (("one", 4), ("two", 6)))
        return b.linear(x, one), b.linear(x, two, b.constant("bias", torch.randn(6, generator=chance)))

    return build("parallel", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("launches",), source="arXiv:1909.08053", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
