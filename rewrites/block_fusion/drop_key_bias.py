"""Drop the bias of the key projection: it adds one number to all scores of a query, and softmax does not see it.

softmax(q (K + 1 b^T)^T) = softmax(q K^T + (q b) 1^T) = softmax(q K^T)

Exact over the reals, whatever hides keys, since the number is the same for every key of a row. Not with a soft cap (scores pass through tanh) and
not where positions turn the key between projection and attention. Source: Namazifar et al. 2023, arXiv:2302.08626.
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
from paretorch.rewrites.block_fusion.weights import argument, through
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "drop_key_bias"
DESCRIBES = ("view", "permute", "unsqueeze", "squeeze", "expand", "alias")


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "linear") and argument(node, 2) is not None and _may_be_key(node):
            reason = _refuses(node)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _may_be_key(linear: Node) -> bool:
    return any(is_op(user, "attention") and _is_key_of(linear, user) for user in through(linear, *DESCRIBES))


def _is_key_of(linear: Node, attention: Node) -> bool:
    source = attention.args[1]
    while isinstance(source, Node) and is_op(source, *DESCRIBES):
        source = source.args[0]
    return source is linear


def _refuses(linear: Node) -> str | None:
    for user in through(linear, *DESCRIBES):
        if not is_op(user, "attention") or not _is_key_of(linear, user):
            return f"{user.name} reads the projection as well and is no attention"
        sources = [user.args[0], user.args[2]]
        for source in sources:
            while isinstance(source, Node) and is_op(source, *DESCRIBES):
                source = source.args[0]
            if source is linear:
                return f"{user.name} reads the projection as query or value too"
        if arguments(user)["softcap"]:
            return f"{user.name} caps its scores at {arguments(user)['softcap']}, so a shift of all of them changes the result"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.copy()
    linear = graph.node(site.name)
    assert linear is not None  # sites said so
    b = Builder(graph, linear, origin=origin_of(linear), rule=NAME, site=site.name)
    graph.replace(linear, b.linear(linear.args[0], linear.args[1]))
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        def heads(name: str) -> Node:
            weight = b.constant(name, torch.randn(width, width, generator=chance))
            y = b.linear(x, weight, b.constant(f"{name}_bias", torch.randn(width, generator=chance)))
            return b.permute(b.view(y, [batch, 5, 2, width // 2]), [0, 2, 1, 3])

        return b.attention(heads("query"), heads("key"), heads("value"), scale=0.5)

    return build("attention", body, x=TensorType("f32", (batch, 5, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "flops"), source="arXiv:2302.08626", example=example, sites=sites,
    rewrite=rewrite,
)  # fmt: skip
