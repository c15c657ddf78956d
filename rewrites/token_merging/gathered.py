"""Rows dropped from one value on, and whatever else has an entry for each token gathered along with them.

    x[B,T,C]  ->  keep_tokens(x, kept: i64[B,K])

Masks, tables of positions, biases of pairs of places, weights and earlier rows that meet the rows behind that value are looked up at the
same places, so every token that stays has its own position, and the order of tokens is kept, so causal attention stays causal. Nothing has
a size here: what is dropped is gone. Which entries are a token's comes from the axis analysis, and for constants, which serve several axes,
from the dimension in which they meet the tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, TokenAxis, Use, rederive_lengths
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, shape_of, tensor_type, type_of
from paretorch.ir.ops import aten, is_op, op_of
from paretorch.ir.ops.tokens import is_match, is_reduction
from paretorch.ir.types import TensorType
from paretorch.rewrites.token_merging.place import computed_from, named, paired_rows, parts_of
from paretorch.rewrites.token_merging.rows import Layout, layout_of, restored, rows_of
from paretorch.rewrites.token_merging.selections import selected

END = 2**63 - 1  # a slice to the end, as export writes it
Tokens = dict[int, tuple[int, Atom]]  # dimensions that are tokens: the first token there, and the axis
Sight = Callable[[Node, Use], str | None]  # what a technique says of a node that mixes or pools the tokens


@dataclass(frozen=True)
class Cut:
    """Where rows are dropped. value: the first value with fewer rows; batch: its batch's atoms; whole: what is computed from it at full
    length, by which the choice is made; after: what is computed from fewer rows, in order; protected: leading tokens that must stay."""

    value: Node
    axis: TokenAxis
    layout: Layout
    batch: tuple[Atom, ...]
    whole: frozenset[Node]
    after: tuple[Node, ...]
    protected: int


def find_cut(
    graph: Graph, axes: AxisFacts, axis: TokenAxis, value: Node, batch: tuple[Atom, ...], chosen_by: Sequence[Node], sight: Sight,
    last: int = 0,
) -> Cut | str:  # fmt: skip
    """The cut at a value, or a sentence that says what forbids it. chosen_by: what says which tokens stay; sight: see `Sight`;
    last: how many tokens at the end all stay, so that places counted from there are theirs."""
    if not isinstance(axis.atom.size, int):
        return f"{named(value)} has {axis.atom.size} tokens, a number not known before it runs"
    layout = layout_of(axes, value, axis.atom, batch)
    if layout is None:
        return f"the {axis.atom.size} tokens are not one dimension beside their batch in {value.name}: {tensor_type(value)}"
    reached = computed_from(graph, value)
    whole = frozenset(ancestors(*chosen_by) & set(reached))
    after = tuple(node for node in reached if node not in whole and node.op != "output")
    paired = paired_rows(axes, axis, after, batch)
    if paired:
        return paired
    nodes = {node.name: node for node in after}
    protected = 0
    for use in axis.uses:
        if use.node not in nodes or (use.kind == "selects" and taken_from_end(nodes[use.node]) <= last):
            continue
        reason = _refused(graph, axes, axis, nodes[use.node], use, sight)
        if reason:
            return reason
        if use.kind == "selects":
            protected = max(protected, selected(graph, axes, axis.atom, nodes[use.node]))
    for output in graph.outputs:
        if isinstance(output, Node) and output in set(after) and axes.dim(output.name, axis.atom) is not None:
            return f"the model returns {named(output)}, {tensor_type(output)}, with one entry for each of the {axis.atom.size} tokens"
    return Cut(value, axis, layout, batch, whole, after, protected)


def taken_from_end(node: Node) -> float:
    """How many entries at the end of an axis hold all that a node selects by places counted from there; infinity if it does otherwise."""
    given = arguments(node)
    from_end = given.get("index" if is_op(node, "select") else "start") if is_op(node, "select", "slice") else None
    return -from_end if isinstance(from_end, int) and from_end < 0 else float("inf")


def ancestors(*nodes: Node) -> set[Node]:
    """These nodes and all that they are computed from."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += current.all_input_nodes
    return found


def _refused(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node, use: Use, sight: Sight) -> str | None:
    if use.kind == "mixes":
        return _by_place(axes, axis, node) or sight(node, use)
    if use.kind == "pools":
        return use.reason or sight(node, use)
    if use.kind == "selects":
        plain = not use.reason and selected(graph, axes, axis.atom, node) >= 0
        return None if plain else use.reason or f"{named(node)} selects tokens by a place that dropping others moves"
    if use.kind == "positions":
        return None if _meets(axes, axis, node) else use.reason
    if use.kind == "appends":
        return None if _rejoins(graph, axes, axis, node) else use.reason or f"{named(node)} joins the {axis.atom.size} tokens with others"
    return None if use.kind == "returns" else use.reason or None


def _by_place(axes: AxisFacts, axis: TokenAxis, node: Node) -> str | None:
    """A sentence for an attention that sees keys by more of their places than their order."""
    if is_op(node, "local_attention"):
        return f"{named(node)} attends to a window of places"
    if not is_op(node, "attention"):
        return None
    given = arguments(node)
    same = axes.dim(given["query"].name, axis.atom) is not None and axes.dim(given["key"].name, axis.atom) is not None
    if given["left"] >= 0 or given["right"] > 0 or given["sinks"] > 0 or (given["right"] == 0 and not (same and given["offset"] == 0)):
        return f"{named(node)} lets a query see keys by their places ({given['left']} before, {given['right']} after it)"
    if given["lengths"] is not None:
        return f"{named(node)} sees the first keys only, {given['lengths'].name} of them"
    return None


def _meets(axes: AxisFacts, axis: TokenAxis, node: Node) -> bool:
    """Whether a node meets something for each place elementwise, so that it can be gathered: a sum, or an attention's mask."""
    op = op_of(node)
    if op is not None and op.axes == "attention":
        key = axes.maps.get(arguments(node)["key"].name, ((), ()))
        return key[-2] == (axis.atom,)
    return op is not None and op.axes == "pointwise"


def _rejoins(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node) -> bool:
    """Whether a concatenation puts tokens back behind as many leading entries as were cut from them."""
    given = arguments(node)
    if not is_op(node, "cat"):
        return False
    rank = len(shape_of(node))
    dim, before = given.get("dim", 0) % rank, 0
    family = [axes.maps.get(part.name, ((),) * rank)[dim] for part in given["tensors"]]
    for atoms, part in zip(family, given["tensors"], strict=True):
        start = parts_of(axes, graph, atoms[0], axis.atom) if len(atoms) == 1 else None
        if start is not None:
            return sum(start) == before and part is given["tensors"][-1] and axes.dim(node.name, axis.atom) == dim
        before += shape_of(part)[dim]
    return False


def drop_at(
    graph: Graph, axes: AxisFacts, cut: Cut, site: Node, rule: str, chosen_by: Sequence[Node], choose: Callable[[Builder], Node]
) -> Graph:
    """The graph, edited in place, with fewer rows from the cut on. choose: builder -> kept: i64[B,K], ascending, emitted behind chosen_by.

    Raises PlanError if something behind it cannot take them.
    """
    last = _hoisted(graph, cut.value, chosen_by)
    b = Builder(graph, last.next, origin=cut.value.meta.get("origin"), rule=rule, site=site.name)
    gatherer = _Gatherer(graph, axes, cut, b, choose(b))
    for node in cut.after:
        gatherer.visit(node)
    rederive_lengths(graph, axes, gatherer.changed)
    return graph.clean()


def _hoisted(graph: Graph, value: Node, chosen_by: Sequence[Node]) -> Node:
    """Move what the choice needs right behind the value; the last of it."""
    order = graph.nodes
    needed, place = ancestors(*chosen_by), order.index(value)
    last = value
    for node in order[place + 1 :]:
        if node in needed:
            last.append(node)
            last = node
    return last


@dataclass
class _Gatherer:
    """Looks up what enters the nodes behind a cut. changed: what is shorter now, for `rederive_lengths`."""

    graph: Graph
    axes: AxisFacts
    cut: Cut
    b: Builder
    kept: Node
    changed: dict[str, tuple[Atom, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inside = set(self.cut.after)
        self.tails: dict[int, Node] = {0: self.kept}
        self.made: dict[tuple[Node, tuple[int, ...], int], Node] = {}
        self.roles: dict[Node, Tokens] = {}
        for node in reversed(self.cut.after):
            self.roles[node] = self._role(node)

    def visit(self, node: Node) -> None:
        if is_op(node, "expand"):
            self._expand(node)
        if is_match(node):
            self._count(node)
        if is_reduction(node) or is_op(node, "embedding"):
            self._refuse_places(node)
        for argument in node.all_input_nodes:
            if argument not in self.inside and argument is not self.kept:
                dims = {**self._demanded(argument, node), **self._tokens_in(argument)}
                if dims:
                    node.replace_input_with(argument, self._gathered(argument, dims, node))

    def _count(self, node: Node) -> None:
        """A later step that leaves a fixed number of tokens drops fewer; one that merges a fixed number must still find them."""
        metric: Any = node.args[0]
        if self.axes.maps.get(metric.name, ((), ()))[1] != (self.cut.axis.atom,):
            return
        given = arguments(node)
        gone, free = int(self.cut.axis.atom.size) - shape_of(self.kept)[1], shape_of(self.kept)[1] - given["protected"]
        leaves = node.meta.get("rule") == self.b.rule
        count = given["count"] - gone if leaves else given["count"]
        if not 0 < count <= (free - 1 if leaves else free // 2):
            raise PlanError(
                f"{named(node)} takes {given['count']} of {self.cut.axis.atom.size} tokens, which are too few for it when {gone} are gone"
            )
        place = [argument.name for argument in node.target._schema.arguments].index("count")  # type: ignore[union-attr]
        node.args = (*node.args[:place], count, *node.args[place + 1 :])

    def _refuse_places(self, node: Node) -> None:
        """What a later step looked up by its tokens' places, without being known to have one entry for each of them, cannot be shortened here."""
        match: Any = node.args[1].args[0] if node.args[1].target is operator.getitem else None  # type: ignore[union-attr]
        if not is_match(match) or self._tokens_in(match.args[0]).get(1, (1, None))[0] != 0:
            return
        if is_op(node, "embedding") or 1 not in self._tokens_in(node.args[0]):  # type: ignore[arg-type]
            raise PlanError(
                f"{match.meta.get('rule')} at {match.meta.get('site')} looks up {named(node)} by the places of the tokens; put this step first"
            )

    def _expand(self, node: Node) -> None:
        """What is repeated for each token is repeated for those that stay."""
        x, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        before = _padded(x, len(sizes), range(len(sizes)))  # type: ignore[arg-type]
        for dim, (start, atom) in self.roles[node].items():
            if before[dim] == 1 and sizes[dim] == atom.size:
                sizes[dim] = shape_of(self._tail(start))[1]
                self.changed[node.name] = (atom, sizes[dim])
        if node.name in self.changed:
            node.args = (x, sizes)
            node.meta["val"] = self.graph.evaluate(node.target, node.args, dict(node.kwargs))

    def _role(self, node: Node) -> Tokens:
        """The dimensions that are tokens, by the axis analysis or by what they meet."""
        found: Tokens = {}
        for user in node.users:
            found.update(self._demanded(node, user))
        return {**found, **self._tokens_in(node)}

    def _tokens_in(self, node: Node) -> Tokens:
        found = {}
        for dim, atoms in enumerate(self.axes.maps.get(node.name, ())):
            parts = parts_of(self.axes, self.graph, atoms[0], self.cut.axis.atom) if len(atoms) == 1 else None
            if parts is not None:
                found[dim] = (sum(parts), atoms[0])
        return found

    def _demanded(self, node: Node, user: Node) -> Tokens:
        """The dimensions of a value that meet the tokens in a node that uses it."""
        op, whole = op_of(user), (0, self.cut.axis.atom)
        if op is None or user.op != "call_function" or not isinstance(type_of(node), TensorType):
            return {}
        shape, found = shape_of(node), {}
        if op.axes == "pointwise" or is_op(user, "cat"):
            offset = len(shape_of(user)) - len(shape)
            along = arguments(user).get("dim", 0) % len(shape_of(user)) if is_op(user, "cat") else -1
            found = {dim - offset: token for dim, token in self.roles.get(user, {}).items() if dim >= offset and dim != along}
        elif op.axes == "attention":
            given = arguments(user)
            sides = {name: self.axes.dim(given[name].name, self.cut.axis.atom) is not None for name in ("query", "key")}
            if node is given.get("mask", given.get("attn_mask")):
                found = {len(shape) - back: whole for back, side in ((1, "key"), (2, "query")) if sides[side] and len(shape) >= back}
            elif node is given.get("key_bias") and sides["key"]:
                found = {len(shape) - 1: whole}
        return {dim: token for dim, token in found.items() if shape[dim] == token[1].size}

    def _gathered(self, node: Node, dims: Tokens, user: Node) -> Node:
        rank = self._rank(node, user)
        key = (node, tuple(sorted(dims)), rank)
        if key not in self.made:
            self.made[key] = self._gather(node, dims, user, rank)
        return self.made[key]

    def _rank(self, node: Node, user: Node) -> int:
        """The rank that a value is brought to where it meets the tokens."""
        return len(shape_of(user)) if (op := op_of(user)) is not None and op.axes == "pointwise" else len(shape_of(node))

    def _gather(self, node: Node, dims: Tokens, user: Node, rank: int) -> Node:
        at = Builder(self.graph, user, origin=self.b.origin, rule=self.b.rule, site=self.b.site)
        batch = self._batch(node)
        current, offset = node, 0
        for dim, (start, _) in sorted(dims.items()):
            if batch is None:
                offset = rank - len(shape_of(node))
                batch = self._batch_of_user(user, rank, node)
                current = self._looked_up(at, node, dim + offset, rank, batch, self._tail(start))
                continue
            layout = Layout(dim + offset, batch)
            rows = at.item(at.keep_tokens(rows_of(at, current, layout), self._tail(start)), 0)
            current = restored(at, rows, current, layout)
        start, atom = next(iter(dims.values()))
        self.changed[current.name] = (atom, shape_of(self._tail(start))[1])
        return current

    def _batch(self, node: Node) -> tuple[int, ...] | None:
        """The dimensions that are the batch; None if the value is the same for all of it."""
        maps = self.axes.maps.get(node.name, ())
        dims = tuple(dim for dim, atoms in enumerate(maps) if atoms and set(atoms) <= set(self.cut.batch))
        covered = tuple(atom for dim in dims for atom in maps[dim])
        if covered and covered != self.cut.batch:
            raise PlanError(f"{named(node)}, {tensor_type(node)}, has an entry for each token and only for a part of the batch")
        return dims if covered or not self.cut.batch else None

    def _batch_of_user(self, user: Node, rank: int, node: Node) -> tuple[int, ...]:
        if is_op(user, "attention") and rank in (2, 4):
            return (0,)
        found = self._batch(user) if (op := op_of(user)) is not None and op.axes == "pointwise" else None
        if found is None or any(size != 1 for size in _padded(node, rank, found)):
            raise PlanError(f"{named(user)} reads {named(node)}, {tensor_type(node)}, in a form in which each sample cannot have its own")
        return found

    def _looked_up(self, at: Builder, node: Node, token: int, rank: int, batch: tuple[int, ...], kept: Node) -> Node:
        """A value that is the same for the whole batch, as rows for each sample."""
        shape = [1] * (rank - len(shape_of(node))) + list(shape_of(node))
        others = [dim for dim in range(rank) if dim != token and dim not in batch]
        order, width = [*batch, token, *others], 1
        for dim in others:
            width *= shape[dim]
        reshape = aten("reshape.default")
        table = at.call(reshape, (at.permute(at.call(reshape, (node, shape)), order), [shape[token], width]))
        rows = at.embedding(table, kept)
        sizes = [-1 if len(batch) == 1 else int(self._size_of_batch(part)) for part in range(len(batch))]
        made = at.call(reshape, (rows, [*sizes, shape_of(kept)[1], *(shape[dim] for dim in others)]))
        return at.permute(made, sorted(range(rank), key=order.__getitem__))

    def _size_of_batch(self, part: int) -> int:
        size = shape_of(self.cut.value)[self.cut.layout.batch[part]]
        if not isinstance(size, int) or len(self.cut.layout.batch) != len(self.cut.batch):
            raise PlanError(
                f"{named(self.cut.value)} has a batch of several axes, {tensor_type(self.cut.value)}, with lengths not known here"
            )
        return size

    def _tail(self, start: int) -> Node:
        """The places kept, counted from a later token on."""
        if start not in self.tails:
            self.tails[start] = self.b.add(self.b.slice(self.kept, 1, start, END), -start)
        return self.tails[start]


def _padded(node: Node, rank: int, dims: Iterable[int]) -> Sequence[int]:
    shape = [1] * (rank - len(shape_of(node))) + list(shape_of(node))
    return [shape[dim] for dim in dims]
