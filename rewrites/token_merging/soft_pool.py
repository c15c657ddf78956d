"""Pools by a softmax over the tokens: few averages of many tokens, with weights that the model has learned.

    weights = softmax(scores[B,T,N'], over T);  y = weights^T x        or        y = sum(weights * x, over T)

Slimming modules, attention pooling of single rows and their like; a softmax that belongs to one attention is a node of its own and not meant
here. A token that stands for several counts as often: weights * size / sum(weights * size) is the softmax of scores + log(size).
Legal where all that is made of the softmax are such averages.
Source: Zong et al. 2022, arXiv:2111.12624; Ilse et al. 2018, arXiv:1802.04712.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match
from paretorch.rewrites.token_merging.place import parts_of
from paretorch.rewrites.token_merging.rows import Layout

ROUTE = (
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "to",
    "clone",
    "alias",
    "expand",
    "weigh_tokens",
    "div",
)  # from weights to their product
LEAST = 1e-30  # the sum of the weights where all tokens are padding


def pooled_softly(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> bool:
    """Whether a softmax over these tokens serves averages only, or whether a product or sum is such an average."""
    if is_op(node, "softmax"):
        return _over_tokens(graph, axes, whole, node) and all(_averages(graph, axes, whole, user, node) for user in node.users)
    if not is_op(node, "matmul", "bmm", "sum"):
        return False
    operands = node.args[0].all_input_nodes if is_op(node, "sum") and is_op(node.args[0], "mul") else node.args[:2]  # type: ignore[union-attr]
    behind = [_behind(operand) for operand in operands]
    return any(is_op(source, "softmax") and pooled_softly(graph, axes, whole, source) for source in behind)


def _behind(node: Any) -> Any:
    while isinstance(node, Node) and is_op(node, *ROUTE):
        node = node.args[0]
    return node


def _over_tokens(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> bool:
    dim = _tokens(graph, axes, whole, node)
    return dim is not None and arguments(node)["dim"] % len(shape_of(node)) == dim


def _tokens(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> int | None:
    """The one dimension of a value that is these tokens, a tail of them, or what a later step left of them."""

    def ours(atom: Atom) -> bool:
        return parts_of(axes, graph, atom, whole) is not None or is_match(graph.node(atom.born))

    while node.name not in axes.maps and is_op(node, "weigh_tokens", "div"):
        node = node.args[0]  # type: ignore[assignment]  # just put there; it has the axes of what it weighs
    found = [dim for dim, atoms in enumerate(axes.maps.get(node.name, ())) if len(atoms) == 1 and ours(atoms[0])]
    return found[0] if len(found) == 1 else None


def _averages(graph: Graph, axes: AxisFacts, whole: Atom, node: Node, weights: Node) -> bool:
    """Whether one use of the weights ends in sums over the tokens."""
    dim = _tokens(graph, axes, whole, weights)
    if dim is None:
        return False
    if is_op(node, "matmul", "bmm"):
        rank = len(shape_of(weights))
        return (node.args[0] is weights) != (node.args[1] is weights) and dim == rank - (1 if node.args[0] is weights else 2)
    if is_op(node, "mul"):
        return all(_sums(graph, axes, whole, user) for user in node.users)
    if is_op(node, "sum") and is_op(weights, "weigh_tokens"):
        return True  # what the weights are divided by
    along = node.args[0] is weights and is_op(node, *ROUTE)
    return along and all(_averages(graph, axes, whole, user, node) for user in node.users)


def _sums(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> bool:
    if not is_op(node, "sum"):
        return False
    x: Any = node.args[0]
    dims, token = arguments(node).get("dim"), _tokens(graph, axes, whole, x)
    return isinstance(dims, (list, tuple)) and token in [dim % len(shape_of(x)) for dim in dims]


def weigh_softly(b: Builder, softmax: Node, layout: Layout, size: Node) -> None:
    """Let the weights of a softmax count each token as often as its size says. b: stamps what is emitted."""
    old = next((user for user in softmax.users if is_op(user, "weigh_tokens")), None)
    if old is not None:
        old.args = (old.args[0], size, *old.args[2:])
        return
    # Its length is not right before the lengths are derived again, so its type is that of what it weighs.
    users, place = list(softmax.users), softmax.next
    at = Builder(b.graph, place, origin=b.origin, rule=b.rule, site=b.site)
    with b.graph.fx.inserting_before(place):
        target, args = torch.ops.paretorch.weigh_tokens.default, (softmax, size, layout.token, list(layout.batch), False)
        weighed = b.graph.fx.call_function(target, args)
    weighed.meta.update(val=softmax.meta["val"], origin=b.origin, rule=b.rule, site=b.site)
    total = at.clamp(at.sum(weighed, [layout.token], True), LEAST)
    shared = at.div(weighed, total)
    for user in users:
        user.replace_input_with(softmax, shared)
