"""Move the bias of the value projection behind attention: every row of attention weights sums to one, so it passes through unchanged.

project(attention(q, k, V + 1 b^T))  ->  project(attention(q, k, V)) + P b,   folded into the projection's bias

Exact over the reals where every query sees a key: with no mask, a constant one that leaves each query a key, or a band that holds its own place.
Heads that share a value (grouped) repeat the bias. Source: Namazifar et al. 2023, arXiv:2302.08626.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import argument, derive, held, is_fixed, only_user, short, wide
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fold_value_bias"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "attention"):
            chain = _chain(node)
            if chain is None or argument(chain[0], 2) is None:
                continue
            reason = _refuses(graph, node, *chain)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _chain(attention: Node) -> tuple[Node, Node] | None:
    """(value projection, output projection) where only the ordinary split and join of heads stands between."""
    turned: Any = attention.args[2]
    if not is_op(turned, "permute") or list(turned.args[1]) != [0, 2, 1, 3] or only_user(turned) is None:
        return None
    viewed = turned.args[0]
    if not is_op(viewed, "view") or only_user(viewed) is None or not is_op(viewed.args[0], "linear"):
        return None
    after = only_user(attention)
    joined = only_user(after) if after is not None and is_op(after, "permute") and list(after.args[1]) == [0, 2, 1, 3] else None  # type: ignore[arg-type]
    project = only_user(joined) if joined is not None and is_op(joined, "view") else None
    if project is None or not is_op(project, "linear") or project.args[0] is not joined:
        return None
    value: Node = viewed.args[0]
    heads, width = shape_of(attention)[1], shape_of(attention)[3]
    splits = shape_of(viewed)[2:] == (shape_of(turned)[1], width) and shape_of(viewed)[:2] == shape_of(value)[:2]
    return (value, project) if splits and shape_of(project.args[0])[-1] == heads * width else None  # type: ignore[arg-type]


def _refuses(graph: Graph, attention: Node, value: Node, project: Node) -> str | None:
    bound = arguments(attention)
    if only_user(value) is None:
        return f"{value.name} has {len(value.users)} users; the others need its bias"
    banded = bound["left"] >= 0 or bound["right"] >= 0
    hides = bound["mask"] is not None and (banded or not _every_row_sees(graph, bound["mask"]))
    if hides or bound["key_bias"] is not None or bound["lengths"] is not None:
        return "a mask may hide every key of a row, whose weights then sum to zero, not one"
    if banded and not _sees_itself(attention, bound):
        return "the band may hide every key of a row, whose weights then sum to zero, not one"
    if not is_fixed(graph, argument(value, 1), argument(value, 2), argument(project, 1), argument(project, 2)):
        return "a weight is no constant of the graph, so it may change between calls"
    return None


def _every_row_sees(graph: Graph, mask: Node) -> bool:
    """Whether the mask is a constant that leaves at least one key to every query."""
    known = graph.known(mask)
    if known is None:
        return False
    return bool((known if known.dtype == torch.bool else known > float("-inf")).any(-1).all())


def _sees_itself(attention: Node, bound: dict[str, Any]) -> bool:
    """Self-attention aligned at the start: the key at the query's own place is in the band."""
    queries, keys = shape_of(attention.args[0])[2], shape_of(attention.args[1])[2]  # type: ignore[arg-type]
    return bool(bound["offset"] == 0 and queries == keys)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    attention = graph.node(site.name)
    chain = _chain(attention) if attention is not None else None
    assert attention is not None and chain is not None  # sites said so  # noqa: PT018
    value, project = chain
    bias, weight, old = wide(graph, argument(value, 2)), wide(graph, argument(project, 1)), wide(graph, argument(project, 2))
    assert bias is not None and weight is not None  # sites said so  # noqa: PT018
    heads, width = shape_of(attention)[1], shape_of(attention)[3]
    groups = heads // (len(bias) // width)
    passed = bias.view(-1, width).repeat_interleave(groups, 0).reshape(-1)
    b = Builder(graph, value, origin=origin_of(value), rule=NAME, site=site.name)
    graph.replace(value, b.linear(value.args[0], argument(value, 1)))
    b = Builder(graph, project, origin=origin_of(project), rule=NAME, site=site.name)
    sources = held(graph, argument(project, 1), argument(value, 2), argument(project, 2))
    name = f"{short(argument(project, 1))}_shifted_bias"
    shift = derive(b, name, (NAME, groups, width), sources, lambda: weight @ passed + (old if old is not None else 0.0))
    graph.replace(project, b.linear(project.args[0], argument(project, 1), shift))
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        def projected(y: Node, name: str) -> Node:
            weight = b.constant(name, torch.randn(width, width, generator=chance))
            return b.linear(y, weight, b.constant(f"{name}_bias", torch.randn(width, generator=chance)))

        def heads(name: str) -> Node:
            return b.permute(b.view(projected(x, name), [batch, 5, 2, width // 2]), [0, 2, 1, 3])

        mixed = b.attention(heads("query"), heads("key"), heads("value"), scale=0.5)
        joined = b.call(torch.ops.aten.reshape.default, (b.permute(mixed, [0, 2, 1, 3]), [batch, 5, width]))
        return projected(joined, "project")

    return build("attention", body, x=TensorType("f32", (batch, 5, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes",), source="arXiv:2302.08626", example=example, sites=sites,
    rewrite=rewrite,
)  # fmt: skip
