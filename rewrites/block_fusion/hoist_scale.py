"""Hoist a number that multiplies query or key into attention's own scale.

attention(q * c, k, v, scale=s)  ->  attention(q, k, v, scale=s * c);   the same for the key, and for division

Exact over the reals, whatever stands between as long as it only re-describes the query. One pass over query or key less.
Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1 (the scale is taken inside the kernel).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import only_user, restride
from paretorch.rewrites.rule import JOIN, Exact, Knob, Refusal, Rule, Site

NAME = "hoist_scale"
DESCRIBES = ("view", "permute", "unsqueeze", "squeeze", "expand")


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "attention", "local_attention"):
            for place in (0, 1):
                scaled = _scaled(node.args[place])
                if scaled is not None:
                    reason = _refuses(scaled)
                    yield Refusal(NAME, scaled.name, reason) if reason else Site(f"{scaled.name}{JOIN}{node.name}", origin_of(node).path)


def _scaled(value: Any) -> Node | None:
    """The product or quotient with a number that this value is a view of, used for nothing else."""
    while isinstance(value, Node) and is_op(value, *DESCRIBES) and only_user(value) is not None:
        value = value.args[0]
    if not isinstance(value, Node) or not is_op(value, "mul", "div") or only_user(value) is None:
        return None
    return value if isinstance(value.args[0], Node) and isinstance(value.args[1], (int, float)) else None


def _refuses(scaled: Node) -> str | None:
    source: Node = scaled.args[0]  # type: ignore[assignment]
    if tensor_type(source) != tensor_type(scaled):
        return f"{scaled.name} makes {tensor_type(scaled)} of {tensor_type(source)}"
    if not scaled.args[1]:
        return f"{scaled.name} has the factor {scaled.args[1]}"
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    scaled, attention = (graph.node(name) for name in site.parts)
    assert scaled is not None and attention is not None  # sites said so  # noqa: PT018
    number = float(scaled.args[1])  # type: ignore[arg-type]
    scale = arguments(attention)["scale"] * (number if is_op(scaled, "mul") else 1.0 / number)
    b = Builder(graph, attention, origin=origin_of(attention), rule=NAME, site=site.name)
    source: Node = scaled.args[0]  # type: ignore[assignment]
    graph.replace(scaled, source)
    graph.replace(attention, b.call(attention.target, attention.args, {**attention.kwargs, "scale": scale}))
    graph.clean()
    restride(graph, [source])
    return graph


def example(batch: int = 2, width: int = 8) -> Graph:
    def body(b: Builder, q: Node, k: Node, v: Node) -> Node:
        return b.attention(b.mul(q, 0.5), k, v, scale=0.25)

    kind = TensorType("f32", (batch, 2, 5, width))
    return build("scaled", body, q=kind, k=kind, v=kind)


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches", "flops"), source="arXiv:2205.14135", example=example,
    sites=sites, rewrite=rewrite,
)  # fmt: skip
