"""Bringing merged tokens back: seams in the graph, where values of merged tokens end and values of all tokens begin.

A seam is opened before lengths are derived again, so that what follows it keeps its old length, and is closed once they are known: then every
token gets the row that it is part of. A map of an earlier merge whose rows are merged once more is composed with the later one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from paretorch.ir.analyze import AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.rewrites.layer_skipping.skip import settle
from paretorch.rewrites.token_merging.place import Place
from paretorch.rewrites.token_merging.rows import layout_of, restored, rows_of
from paretorch.rewrites.token_merging.selections import selected


@dataclass(frozen=True)
class Seam:
    """value: of merged tokens; stand_in: what stands for the same value of all tokens while the seam is open; front: whether all that reads it
    reads leading tokens of each frame, which need no map."""

    value: Node
    stand_in: Node
    front: bool = False


def open_seams(graph: Graph, axes: AxisFacts, place: Place) -> list[Seam]:
    """Let whoever needs all tokens of a value, or leading ones of every frame, read a stand-in of its old type."""
    seams: dict[tuple[Node, bool], Seam] = {}
    for cut in place.cuts:
        front = place.clips is not None and _reads_front(graph, axes, place, cut.user)
        if (cut.value, front) not in seams:
            name = f"{cut.value.name}_{'front' if front else 'whole'}"
            with graph.fx.inserting_after(cut.value):
                stand_in = graph.fx.create_node("call_function", aten("clone.default"), (place.value,), name=name)
            stand_in.meta["val"] = cut.value.meta["val"]
            seams[cut.value, front] = Seam(cut.value, stand_in, front)
        cut.user.replace_input_with(cut.value, seams[cut.value, front].stand_in)
    return list(seams.values())


def _reads_front(graph: Graph, axes: AxisFacts, place: Place, node: Node) -> bool:
    """Whether a node takes tokens by place of which each frame keeps its own: one leading token, or a part from the first on."""
    if not is_op(node, "select", "slice") or selected(graph, axes, place.axis.atom, node) < 0:
        return False
    given = arguments(node)
    along = given["dim"] % len(shape_of(given["self"])) == axes.dim(given["self"].name, place.axis.atom)
    return along and (is_op(node, "select") or (not given.get("start") and given.get("step", 1) == 1))


def close_seams(
    graph: Graph, axes: AxisFacts, place: Place, seams: Sequence[Seam], b: Builder,
    bring_back: Callable[[Builder, Node], Node],
) -> None:  # fmt: skip
    """Put what brings the tokens back in the place of each stand-in. bring_back: (builder, rows [B,T',C]) -> rows [B,T,C]."""
    for seam in seams:
        layout = layout_of(axes, seam.value, place.axis.atom, place.batch)
        assert layout is not None  # a cut is made only where there is one
        at = Builder(graph, seam.stand_in, origin=origin_of(seam.value), rule=b.rule, site=b.site)
        whole = restored(at, bring_back(at, rows_of(at, seam.value, layout)), seam.stand_in, layout)
        graph.replace(seam.stand_in, whole)
        graph.fx.erase_node(seam.stand_in)
        settle(graph, whole)


def compose(graph: Graph, axes: AxisFacts, place: Place, b: Builder, follow: Callable[[Builder, Node], Node]) -> None:
    """Let what brings back tokens of an earlier merge, and reads rows that are merged now, follow both maps. follow: (builder, that map) -> both."""
    composed: dict[Node, Node] = {}
    for node in place.downstream:
        if not is_op(node, "unmerge_tokens"):
            continue
        x, places = node.all_input_nodes
        if axes.dim(x.name, place.axis.atom) is None:
            continue
        if places not in composed:
            composed[places] = follow(Builder(graph, node, origin=b.origin, rule=b.rule, site=b.site), places)
        node.args = (x, composed[places])
