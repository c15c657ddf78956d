"""Drop the bias of the key projection: it adds one number to all scores of a query, and softmax does not see it.

softmax(q (K + 1 b^T)^T) = softmax(q K^T + (q b) 1^T) = softmax(q K^T)

Exact over the reals, whatever hides keys, since the number is the same for every key of a row. Not with a soft cap (scores pass through tanh), not
where anything but views stands between projection and attention (positions turn each key by its own angle), and not where those views deal
channels to the axis of keys, which is found by sending a bias through them. Source: Namazifar et al. 2023, arXiv:2302.08626.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
DESCRIBES = ("view", "permute", "unsqueeze", "squeeze", "expand", "alias", "slice", "select")
ATTENTIONS = ("attention", "local_attention")


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if is_op(node, "linear") and argument(node, 2) is not None and _may_be_key(node):
            reason = _refuses(node)
            yield Refusal(NAME, node.name, reason) if reason else Site(node.name, origin_of(node).path)


def _may_be_key(linear: Node) -> bool:
    return any(is_op(user, *ATTENTIONS) and _views(user.args[1])[0] is linear for user in through(linear, *DESCRIBES))


def _views(value: Any) -> tuple[Any, list[Node]]:
    """(what a value is a view of, the views from there to the value)."""
    chain: list[Node] = []
    while isinstance(value, Node) and is_op(value, *DESCRIBES):
        chain.append(value)
        value = value.args[0]
    return value, chain[::-1]


def _refuses(linear: Node) -> str | None:
    for user in through(linear, *DESCRIBES):
        if not is_op(user, *ATTENTIONS):
            return f"{user.name} reads the projection as well and is no attention"
        if any(_views(operand)[0] is linear for place, operand in enumerate(user.args) if place != 1):
            return f"{user.name} reads the projection as query or value too"
        if arguments(user)["softcap"]:
            return f"{user.name} caps its scores at {arguments(user)['softcap']}, so a shift of all of them changes the result"
        problem = _varies_by_key(linear, _views(user.args[1])[1])
        if problem is not None:
            return problem
    return None


def _varies_by_key(linear: Node, views: list[Node]) -> str | None:
    """Why the bias may differ between the keys of one row of scores; None if it is the same for all."""
    try:
        shape = [_size(size) for size in linear.meta["val"].shape]
        value = torch.arange(shape[-1]).to(torch.int16).expand(shape)
        for view in views:
            args, kwargs = torch.fx.node.map_arg((view.args[1:], view.kwargs), lambda node: _size(node.meta["val"]))
            sizes: list[Any] = [[_size(size) for size in arg] if isinstance(arg, (list, tuple)) else arg for arg in args]
            value = view.target(value, *sizes, **kwargs) if not is_op(view, "view") else value.reshape(sizes[0])  # type: ignore[operator]
    except (RuntimeError, TypeError) as error:
        return f"the views between {linear.name} and its attention cannot be followed: {str(error).splitlines()[0]}"
    if bool((value == value.narrow(2, 0, 1)).all()):
        return None
    return f"the views after {linear.name} deal its channels to the axis of keys, so its bias differs between keys"


def _size(size: Any) -> Any:
    """A number; that of the example for a symbolic size."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
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
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes",), source="arXiv:2302.08626", example=example, sites=sites,
    rewrite=rewrite,
)  # fmt: skip
