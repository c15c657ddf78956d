"""Fewer tokens from one value on: every user of it reads the fewer rows, and all that reads tokens downstream learns their sizes.

Attention adds log(size) to the scores of a key, instead of the mask that said which tokens are padding (size 0 says so now); sums and
means over tokens weigh them; later steps count them in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, rederive_lengths
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.tokens import is_match, is_reduction, matched
from paretorch.ir.types import DTYPES
from paretorch.rewrites.sparse_attention.key_bias import is_table, mask_by_pairs, per_key, seen_keys
from paretorch.rewrites.token_merging.companions import merge_companions
from paretorch.rewrites.token_merging.place import Place, parts_of, pooled
from paretorch.rewrites.token_merging.rows import layout_of, restored, rows_of
from paretorch.rewrites.token_merging.soft_pool import pooled_softly, weigh_softly
from paretorch.rewrites.token_merging.unmerge import close_seams, compose, open_seams
from paretorch.rewrites.token_merging.virtual import bring_down, size_behind

END = 2**63 - 1  # a slice to the end, as export writes it


@dataclass(frozen=True)
class Reducer:
    """What a technique put at a place.

    indices: kept, source and target of its match, where a token that is dropped has as target the one that stands for it. The functions emit
    through a builder. rows: rows of the stream [B,T,C] -> a node of ([B,T',C], size [B,T']);
    weights: other numbers of each token [B,T,D] -> [B,T',D], their average as the sizes weigh it; back: (rows [B,T',C], map [B,T]) -> [B,T,C];
    front: rows [B,T',C] -> [B,p,C], the leading tokens of each frame, where frames were folded; places: i64[B,T], which row each token is part of,
    where the match says so itself.
    """

    indices: tuple[Node, Node, Node]
    rows: Callable[[Builder, Node], Node]
    weights: Callable[[Builder, Node], Node]
    back: Callable[[Builder, Node, Node], Node] = lambda at, rows, places: at.unmerge_tokens(rows, places)
    front: Callable[[Builder, Node], Node] = lambda at, rows: rows
    places: Node | None = None

    def map(self, at: Builder, previous: Node | None = None) -> Node:
        """i64[B,T], the row that each token is part of; after an earlier map for each token that this one began with."""
        if self.places is None:
            return at.source_map(*self.indices, previous) if previous is not None else at.source_map(*self.indices)
        return self.places if previous is None else at.follow_map(self.places, previous)


def merging(b: Builder, match: Node, size: Node | None) -> Reducer:
    """The reducer that merges tokens as a match says, by the average that their sizes weigh."""
    indices = (b.item(match, 0), b.item(match, 1), b.item(match, 2))

    def rows(at: Builder, x: Node) -> Node:
        return at.merge_tokens(x, *indices, size)

    return Reducer(indices, rows, lambda at, weights: at.item(rows(at, weights), 0))


def dropping(b: Builder, match: Node, size: Node | None) -> Reducer:
    """The reducer that drops the tokens that a match says go."""
    indices = (b.item(match, 0), b.item(match, 1), b.item(match, 2))
    return Reducer(
        indices, lambda at, x: at.keep_tokens(x, indices[0], size), lambda at, weights: at.item(at.keep_tokens(weights, indices[0]), 0)
    )


def reduce_at(graph: Graph, axes: AxisFacts, place: Place, rule: str, emit: Callable[[Builder, Node | None], Reducer]) -> Graph:
    """The graph, edited in place, with fewer tokens from the place on. emit: (builder, sizes of the tokens or None) -> what is done to them.

    Raises PlanError if something downstream cannot take it.
    """
    value = place.value
    b = Builder(graph, value.next, origin=value.meta.get("origin"), rule=rule, site=place.mixer.name)
    reducer = emit(b, sizes_of(b, place))
    reduced = reducer.rows(b, rows_of(b, value, place.layout))
    rows = b.item(reduced, 0)
    fewer = restored(b, rows, value, place.layout, place.fold)
    size = b.item(reduced, 1)
    compose(graph, axes, place, b, reducer.map)
    for node in place.downstream:
        node.replace_input_with(value, fewer)
    seams = open_seams(graph, axes, place)
    merge_companions(graph, axes, place, b, reducer.weights)
    if not is_silent(reduced):
        Carrier(graph, axes, place, b, size).carry()
    lowered = bring_down(graph, axes, place.axis.atom, place.batch, place.lowered, place.downstream, reducer.weights, b)
    along = {place.clips.axis.atom: place.clips.fewer} if place.clips else {}
    shorter = {node.name: (place.axis.atom, shape_of(rows)[1]) for node in (fewer, *lowered)}
    rederive_lengths(graph, axes, shorter, along=along)
    close_seams(graph, axes, place, [seam for seam in seams if seam.front], b, reducer.front)
    whole = [seam for seam in seams if not seam.front]
    if whole:
        places = reducer.map(b)
        close_seams(graph, axes, place, whole, b, lambda at, rows: reducer.back(at, rows, places))
    return graph.clean()


def is_silent(reduction: Node) -> bool:
    """Whether all sizes are one behind a reduction, so that nobody needs them."""
    return is_op(reduction, "keep_tokens") and arguments(reduction)["size"] is None


def sizes_of(b: Builder, place: Place) -> Node | None:
    """The sizes of the tokens at a place, T[B,T]; None if all are one."""
    return size_behind(b, place.mixer) if place.virtual else sizes_before(b, place.mixer)


def sizes_before(b: Builder, mixer: Node) -> Node | None:
    """The sizes of the tokens that this attention reads, T[B,T]: what its key bias is the log of, exp of its mask; None if all are one.

    A mask of pairs of places tells which of them no query sees.
    """
    given = arguments(mixer)
    parts = []
    if given["key_bias"] is not None:
        bias = given["key_bias"]
        parts.append(bias.args[0] if is_op(bias, "log_size") else _weight(b, bias))
    if given["mask"] is not None and mask_by_pairs(mixer):
        parts += [] if is_table(mixer) else [seen_keys(b, given["mask"])]
    elif given["mask"] is not None:
        parts.append(_weight(b, per_key(b, given["mask"], shape_of(given["key"])[-2])))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else b.mul(*parts)


def _weight(b: Builder, bias: Node) -> Node:
    """The factor by which a bias or mask changes a key's weight, in f32 at least."""
    dtype = DTYPES[tensor_type(bias).dtype]
    if dtype == torch.bool:
        return b.call(aten("_to_copy.default"), (bias,), {"dtype": torch.float32})
    wide = torch.promote_types(dtype, torch.float32)
    return b.exp(bias if dtype == wide else b.call(aten("_to_copy.default"), (bias,), {"dtype": wide}))


class Carrier:
    """Gives what is downstream of one step the new sizes. size: T[B,T'], emitted after `b`'s place."""

    def __init__(self, graph: Graph, axes: AxisFacts, place: Place, b: Builder, size: Node) -> None:
        self.graph, self.axes, self.place, self.b = graph, axes, place, b
        self.sizes: dict[Atom, Node] = {place.axis.atom: size}
        self.biases: dict[Atom, Node] = {}
        self.told: set[Atom] = set()  # the axes behind later steps that have just learned of sizes

    def carry(self) -> None:
        """Edit every node downstream that must know sizes."""
        for node in self.place.downstream:
            if is_op(node, "attention"):
                self._attention(node)
            elif is_match(node):
                self._step(node, node.args[0], 1)
            elif is_reduction(node):
                self._step(node, matched(node), 1)
            elif is_op(node, "class_weights", "received_weights"):
                self._step(node, node.args[1], -2)
            elif is_op(node, "softmax"):
                self._soft_pool(node)
            elif is_op(node, "mean", "sum") and not pooled_softly(self.graph, self.axes, self.place.axis.atom, node):
                self._pool(node)

    def size(self, atom: Atom) -> Node | None:
        """The sizes along the axis or a tail of it; None for any other axis."""
        parts = parts_of(self.axes, self.graph, atom, self.place.axis.atom)
        if parts is None:
            return None
        if atom not in self.sizes:
            self.sizes[atom] = self.b.slice(self.sizes[self.place.axis.atom], 1, sum(parts), END)
        return self.sizes[atom]

    def _of(self, node: Node, dim: int) -> tuple[Atom, Node] | None:
        """The axis in one dimension of a value and its sizes, if it is ours."""
        atoms = self.axes.maps[node.name][dim] if node.name in self.axes.maps else ()
        size = self.size(atoms[0]) if len(atoms) == 1 else None
        return (atoms[0], size) if size is not None else None

    def _attention(self, node: Node) -> None:
        given = arguments(node)
        found = self._of(given["key"], -2)
        if found is None:
            return
        atom, size = found
        if atom not in self.biases:
            self.biases[atom] = self.b.log_size(size)
        options = {name: value for name, value in node.kwargs.items() if name not in ("mask", "key_bias")}
        node.args = (given["query"], given["key"], given["value"])
        node.kwargs = {"key_bias": self.biases[atom], **options}

    def _step(self, node: Node, tokens: Any, dim: int) -> None:
        """A later step counts the sizes in. tokens, dim: what of the node's inputs tells its tokens, and in which dimension."""
        found = self._of(tokens, dim)
        if found is None:
            return
        was_silent = is_silent(node)
        place = [argument.name for argument in node.target._schema.arguments].index("size")  # type: ignore[union-attr]
        args = [*node.args, *[None] * (place + 1 - len(node.args))]
        args[place] = found[1]
        node.args = tuple(args)
        if was_silent:
            self._tell_behind(node)

    def _tell_behind(self, node: Node) -> None:
        """What is behind a step that dropped tokens while all sizes were one learns of them now."""
        ((atom,),) = self.axes.maps[node.args[1].name][1:]  # type: ignore[union-attr, index]
        if atom not in self.told:
            self.told.add(atom)
            b = Builder(self.graph, node.next, origin=self.b.origin, rule=self.b.rule, site=self.b.site)
            place = replace(self.place, axis=replace(self.place.axis, atom=atom))
            Carrier(self.graph, self.axes, place, b, b.item(node, 1)).carry()

    def _pool(self, node: Node) -> None:
        found = pooled(self.graph, self.axes, self.place.axis.atom, node, self.place.batch)
        if found is None or not self._runs_over(node, found[1].token):
            return
        (atom, layout), x = found, node.args[0]
        size = self.size(atom)
        if is_op(x, "weigh_tokens"):
            x.args = (x.args[0], size, *x.args[2:])  # type: ignore[union-attr]
            return
        # Its length is not right before the lengths are derived again, so its type is that of what it weighs.
        with self.graph.fx.inserting_before(node):
            target, args = torch.ops.paretorch.weigh_tokens.default, (x, size, layout.token, list(layout.batch), is_op(node, "mean"))
            weighed = self.graph.fx.call_function(target, args)
        stamp = {"origin": self.b.origin, "rule": self.b.rule, "site": self.b.site}
        weighed.meta.update(val=x.meta["val"], **stamp)  # type: ignore[union-attr]
        node.replace_input_with(x, weighed)  # type: ignore[arg-type]

    def _soft_pool(self, node: Node) -> None:
        found = self._of(node, arguments(node)["dim"])
        layout = layout_of(self.axes, node, found[0], self.place.batch) if found else None
        if found and layout:
            weigh_softly(self.b, node, layout, found[1])

    def _runs_over(self, node: Node, token: int) -> bool:
        given = arguments(node)
        dims, rank = given.get("dim"), len(shape_of(given["self"]))
        if dims is None or dims == []:
            return True
        return token in [dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
