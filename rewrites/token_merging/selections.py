"""Tokens that the model reads by their places, such as a class token: those before the last of them must stay where they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, TokenAxis
from paretorch.ir.graph import Graph, arguments
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match


def lineage(graph: Graph, axes: AxisFacts, atom: Atom) -> list[Atom]:
    """An axis and those of which earlier steps made it; the last is the one that the model begins with."""
    found = [atom]
    while (born := graph.node(found[-1].born)) is not None and is_match(born):
        found.append(axes.maps[born.args[0].name][1][0])  # type: ignore[union-attr, index]
    return found


def whole_of(graph: Graph, axes: AxisFacts, atom: Atom) -> Atom:
    """The axis of which earlier steps made this one, as the model begins with it."""
    return lineage(graph, axes, atom)[-1]


def selections(graph: Graph, axes: AxisFacts, axis: TokenAxis, downstream: Iterable[Node]) -> list[Node]:
    """The nodes downstream that select tokens by place, however many of them are left there or brought back."""
    names = {use.node for other in _family(graph, axes, axis) for use in other.uses if use.kind == "selects"}
    return [node for node in downstream if node.name in names]


def _family(graph: Graph, axes: AxisFacts, axis: TokenAxis) -> list[TokenAxis]:
    """The axes of the same tokens, however many of them are left."""
    whole = whole_of(graph, axes, axis.atom)
    return [other for other in axes.tokens if whole_of(graph, axes, other.atom) == whole]


def maxima(graph: Graph, axes: AxisFacts, axis: TokenAxis, downstream: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes downstream that take the largest or the least over these tokens, or over what later steps leave of them."""
    names = {use.node for other in _family(graph, axes, axis) for use in other.uses if use.kind == "pools"}
    return tuple(node for node in downstream if node.name in names and is_op(node, "amax", "amin", "max_dim"))


def leading_tokens(graph: Graph, axes: AxisFacts, axis: TokenAxis, downstream: Iterable[Node]) -> int:
    """How many leading tokens are read by their places downstream."""
    return max([0, *(selected(graph, axes, axis.atom, node) for node in selections(graph, axes, axis, downstream))])


def read_tokens(graph: Graph, axes: AxisFacts, axis: TokenAxis, downstream: Iterable[Node]) -> tuple[int, ...]:
    """The places of those of the leading tokens that are read one by one."""
    return tuple(sorted({place for node in selections(graph, axes, axis, downstream) for place in _read(graph, axes, axis.atom, node)}))


def selected(graph: Graph, axes: AxisFacts, atom: Atom, node: Node) -> int:
    """How many leading tokens a selection by place needs to keep theirs; -1 if it needs later ones, or more than half of all."""
    if is_op(node, "fold_frames", "unfold_frames"):
        return int(arguments(node)["leading"]) * (int(arguments(node)["count"]) if is_op(node, "unfold_frames") else 1)
    if not is_op(node, "select", "slice", "split"):
        return -1
    whole = whole_of(graph, axes, atom)
    given, start, count = arguments(node), _start(graph, axes, whole, node), -1
    if is_op(node, "select"):
        count = int(given["index"]) + 1 if given["index"] >= 0 else -1
    elif is_op(node, "slice"):
        first, end = given.get("start") or 0, given.get("end")
        count = int(first) if first > 0 else int(end) if isinstance(end, int) else -1
    elif is_op(node, "split") and isinstance(given.get("split_sizes"), (list, tuple)):
        count = sum(given["split_sizes"][:-1])
    until = start + count if start is not None and count >= 0 else -1
    return until if until <= whole.size // 2 else -1


def _read(graph: Graph, axes: AxisFacts, atom: Atom, node: Node) -> range:
    """The places of the tokens that a selection takes, if these are some leading ones and not all behind a place."""
    if is_op(node, "fold_frames", "unfold_frames"):
        return range(selected(graph, axes, atom, node))
    until = selected(graph, axes, atom, node)
    if until < 0 or (is_op(node, "slice") and (arguments(node).get("start") or 0) > 0):
        return range(0)
    start = _start(graph, axes, whole_of(graph, axes, atom), node)
    assert start is not None  # `selected` needs it, too
    return range(until - 1 if is_op(node, "select") else start, until)


def _start(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> int | None:
    """The place among the tokens of the whole axis of the first that a selection could take; None if that cannot be told.

    Slices shift places; steps that make tokens fewer leave the leading ones where they are.
    """
    x, start = arguments(node)["self"], 0
    found = axes.maps.get(x.name, ())
    atoms = found[arguments(node)["dim"] % len(found)] if found else ()
    while atoms != (whole,):
        born = graph.node(atoms[0].born) if len(atoms) == 1 else None
        if born is not None and is_match(born):
            atoms = axes.maps[born.args[0].name][1]  # type: ignore[union-attr, index]
        elif born is not None and is_op(born, "slice") and (arguments(born)["start"] or 0) >= 0:
            given = arguments(born)
            start, source = start + (given["start"] or 0), axes.maps.get(given["self"].name, ())
            atoms = source[given["dim"] % len(source)] if source else ()
        else:
            return None
    return start
