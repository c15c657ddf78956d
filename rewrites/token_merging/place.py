"""Where tokens may be merged: the attention whose keys say which are alike, the value of the stream to shorten, and all that forbids it.

Everything comes from dataflow: the token axis is an atom of the axis analysis, the place is the end of the attention's residual block, and
the uses of the axis downstream of it say what must stay (tokens selected by place), what must know the sizes (attention, sums, means) and
what cannot be shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, Facts, TokenAxis, Use
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match, is_reduction
from paretorch.rewrites.layer_skipping.skip import region
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a value are its tokens and, in order, its batch."""

    token: int
    batch: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """mixer: the self-attention; value: the stream's value after its block; protected: leading tokens that must stay;
    downstream: all that is computed from value, in order; largest: the most tokens that may be merged; batch: the batch's atoms;
    read: the places of those of the leading tokens that the model reads one by one, such as a class token."""

    mixer: Node
    value: Node
    axis: TokenAxis
    layout: Layout
    batch: tuple[Atom, ...]
    protected: int
    downstream: tuple[Node, ...]
    largest: int
    read: tuple[int, ...] = ()


def find_place(graph: Graph, facts: Facts, axis: TokenAxis, name: str) -> Place | str:
    """The place that belongs to one self-attention, or a sentence that says what forbids it."""
    nodes = {node.name: node for node in graph.nodes}
    mixer, atom = nodes[name], axis.atom
    if not is_op(mixer, "attention"):
        return f"{named(mixer)} is {mixer.target}, which is not recognised as attention or is local already"
    if axis.causal:
        return _by_place(nodes, axis)
    if not isinstance(atom.size, int):
        return f"{named(mixer)} runs over {atom.size} tokens, a number not known before it runs"
    value = _end_of_block(facts, nodes, mixer)
    if value is None:
        return f"{named(mixer)} stands in no block of a residual stream, so there is no one value that carries the tokens on"
    batch = _batch(facts.axes, mixer)
    layout = layout_of(facts.axes, value, atom, batch)
    if layout is None:
        return f"the {atom.size} tokens of {named(mixer)} are not one dimension beside its batch in {value.name}: {tensor_type(value)}"
    pairs = mask_by_pairs(mixer)
    if pairs:
        return pairs  # and so nothing tells the sizes of its keys
    downstream = _downstream(graph, value)
    taken = next((node for node in downstream if is_reduction(node) and _takes(node, value)), None)
    if taken is not None:
        return f"tokens are merged after {named(mixer)} already, by {taken.meta.get('rule') or taken.name}"
    refusal = _forbidden(graph, facts, axis, mixer, downstream, batch)
    if refusal:
        return refusal
    selections = [nodes[use.node] for use in _uses(axis, downstream) if use.kind == "selects"]
    protected = max((_selected(graph, facts.axes, atom, node) for node in selections), default=0)
    read = sorted({place for node in selections for place in _read(graph, facts.axes, atom, node)})
    largest = min([(atom.size - protected) // 2, *(_slack(node) for node in downstream if is_match(node))])
    return Place(mixer, value, axis, layout, batch, protected, downstream, largest, tuple(read))


def named(node: Node) -> str:
    """The node with its place in the user's model."""
    return f"{node.name} ({origin_of(node)})"


def layout_of(axes: AxisFacts, node: Node, atom: Atom, batch: Sequence[Atom]) -> Layout | None:
    """The dimension that is this atom and those that make up the batch; None if they are no dimensions of their own."""
    token = axes.dim(node.name, atom)
    if token is None:
        return None
    dims = tuple(
        i for i, atoms in enumerate(axes.maps[node.name]) if i != token and (atoms or i < token) and set(atoms) <= set(batch)
    )  # a dimension of 1 before the tokens counts as batch
    covered = tuple(part for dim in dims for part in axes.maps[node.name][dim])
    return Layout(token, dims) if covered == tuple(batch) else None


def parts_of(axes: AxisFacts, graph: Graph, atom: Atom, whole: Atom) -> tuple[int, ...] | None:
    """Starts of the slices by which this atom was cut from the end of the whole one: () for itself; None if it came about otherwise."""
    if atom == whole:
        return ()
    born = graph.node(atom.born)
    if born is None or not is_op(born, "slice"):
        return None
    given = arguments(born)
    source = axes.maps.get(given["self"].name, ())
    parent = source[given["dim"] % len(source)] if source else ()
    start = given["start"] or 0
    if len(parent) != 1 or not isinstance(parent[0].size, int) or start < 0 or atom.size != parent[0].size - start:
        return None
    before = parts_of(axes, graph, parent[0], whole)
    return None if before is None else (*before, start)


def _batch(axes: AxisFacts, mixer: Node) -> tuple[Atom, ...]:
    key = arguments(mixer)["key"]
    return axes.maps[key.name][0] if key.name in axes.maps else ()


def _end_of_block(facts: Facts, nodes: dict[str, Node], mixer: Node) -> Node | None:
    """The value after the block that this attention is part of."""
    position = {node: number for number, node in enumerate(nodes.values())}
    for stream in facts.streams:
        for block in stream.blocks:
            before, after = nodes[block.before], nodes[block.after]
            near = position[before] < position[mixer] < position[after]
            if near and (mixer.name in block.nodes or mixer in region(before, after, position)):
                return after
    return None


def _by_place(nodes: dict[str, Node], axis: TokenAxis) -> str:
    """The sentence about the first attention on this axis that hides tokens by their places."""
    sides = {name: arguments(nodes[name]).get("right", -1) for name in axis.mixers}
    masked = (name for name in axis.mixers if sides[name] >= 0 or (is_op(nodes[name], "attention") and mask_by_pairs(nodes[name])))
    first = next(masked, axis.mixers[0])
    if sides[first] > 0:
        return f"{named(nodes[first])} attends to a window of places, which merging moves"
    pairs = mask_by_pairs(nodes[first]) if is_op(nodes[first], "attention") and sides[first] < 0 else None
    return pairs or f"{named(nodes[first])} hides later tokens from earlier ones; merging leaks what comes later into what comes before"


def _downstream(graph: Graph, value: Node) -> tuple[Node, ...]:
    reached = {value}
    found = []
    for node in graph.nodes:
        if any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
            found.append(node)
    return tuple(found)


def _uses(axis: TokenAxis, downstream: Iterable[Node]) -> list[Use]:
    inside = {node.name for node in downstream}
    return [use for use in axis.uses if use.node in inside]


def _takes(reduction: Node, value: Node) -> bool:
    """Whether it is this value whose rows a reduction makes fewer, laid out as rows or not."""
    x: Any = reduction.args[0]
    while x is not value and is_op(x, "permute", "view"):
        x = x.args[0]
    return x is value


def _selected(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> int:
    """How many leading tokens a selection by place needs to keep theirs; -1 if it needs later ones."""
    if not is_op(node, "select", "slice", "split"):
        return -1
    given, start, count = arguments(node), _start(graph, axes, whole, node), -1
    if is_op(node, "select"):
        count = int(given["index"]) + 1 if given["index"] >= 0 else -1
    elif is_op(node, "slice"):
        first, end = given.get("start") or 0, given.get("end")
        count = int(first) if first > 0 else int(end) if isinstance(end, int) else -1
    elif is_op(node, "split") and isinstance(given.get("split_sizes"), (list, tuple)):
        count = sum(given["split_sizes"][:-1])
    return start + count if start is not None and count >= 0 else -1


def _read(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> range:
    """The places of the tokens that a selection takes, if these are some leading ones and not all behind a place."""
    start, until = _start(graph, axes, whole, node), _selected(graph, axes, whole, node)
    if start is None or until < 0 or (is_op(node, "slice") and (arguments(node).get("start") or 0) > 0):
        return range(0)
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


def _slack(node: Node) -> int:
    """How many tokens fewer a later match could have and still find its count."""
    metric, _, count, protected = node.args[:4]
    return int(metric.meta["val"].shape[1]) - int(protected) - 2 * int(count)  # type: ignore[union-attr, arg-type]


def _forbidden(graph: Graph, facts: Facts, axis: TokenAxis, mixer: Node, downstream: Sequence[Node], batch: tuple[Atom, ...]) -> str | None:
    """The first thing downstream that cannot take fewer tokens, as a sentence."""
    axes = facts.axes
    paired = _paired(axes, axis, downstream, batch)
    if paired:
        return paired
    nodes = {node.name: node for node in downstream}
    for use in _uses(axis, downstream):
        node = nodes[use.node]
        if use.kind == "returns":
            continue
        reason = _refused_use(graph, axes, axis, mixer, node, use, batch)
        if reason:
            return reason
    returned = [value for value in graph.outputs if isinstance(value, Node) and value in set(downstream)]
    for value in returned:
        if any(axis.atom in atoms for atoms in axes.maps.get(value.name, ())):
            return f"the model returns {named(value)}, {tensor_type(value)}, with one entry for each of the {axis.atom.size} tokens"
    return None


def _paired(axes: AxisFacts, axis: TokenAxis, downstream: Sequence[Node], batch: tuple[Atom, ...]) -> str | None:
    """A sentence if something downstream pairs tokens of the same place in different rows of the batch, such as frames of a video:
    each row merges others, so their places no longer belong together."""
    inside = {node.name for node in downstream}
    for other in axes.tokens:
        mixing = [name for name in other.mixers if name in inside]
        if other.atom in batch and mixing:
            return f"{mixing[0]} mixes the {other.atom.size} rows of the batch that have the same place among the {axis.atom.size} tokens"
    for node in downstream:
        made = {atom for atoms in axes.maps.get(node.name, ()) for atom in atoms}
        for argument in node.all_input_nodes if axis.atom in made else ():
            given = {atom for atoms in axes.maps.get(argument.name, ()) for atom in atoms}
            if axis.atom in given and (set(batch) & given) - made:
                return f"{named(node)} joins rows of the batch by the places of their {axis.atom.size} tokens"
    return None


def _refused_use(graph: Graph, axes: AxisFacts, axis: TokenAxis, mixer: Node, node: Node, use: Use, batch: tuple[Atom, ...]) -> str | None:
    if use.kind == "mixes":
        return _refused_mixing(graph, axes, axis, mixer, node)
    if use.kind == "pools":
        return use.reason or _refused_pool(graph, axes, axis, node, batch)
    if use.kind == "selects":
        plain = not use.reason and _selected(graph, axes, axis.atom, node) >= 0
        return (
            None if plain else use.reason or f"{named(node)} selects tokens by a place that merging moves: only leading tokens keep theirs"
        )
    if use.kind == "appends":
        return use.reason or f"{named(node)} joins the {axis.atom.size} tokens with others along their axis"
    if use.kind == "positions":
        return use.reason or f"{named(node)} adds something for each position"
    return use.reason or None  # opaque and baked lengths; a view that names the length is repaired


def _refused_mixing(graph: Graph, axes: AxisFacts, axis: TokenAxis, mixer: Node, node: Node) -> str | None:
    if not is_op(node, "attention"):
        kind = "attends to a window of places" if is_op(node, "local_attention") else f"mixes tokens by {node.target}, not as one attention"
        return f"{named(node)} {kind}"
    given, own = arguments(node), arguments(mixer)
    if given["left"] >= 0 or given["right"] >= 0:
        return f"{named(node)} lets a query see keys by their places ({given['left']} before, {given['right']} after it)"
    pairs = mask_by_pairs(node)
    if pairs:
        return pairs
    key = axes.maps[given["key"].name][-2] if given["key"].name in axes.maps else ()
    if len(key) != 1 or parts_of(axes, graph, key[0], axis.atom) is None:
        return None  # its keys are others, or rows that a later match made: their sizes come from there
    for name in ("mask", "key_bias"):
        if given[name] is not own[name] and own["key"] is not given["key"]:
            return f"{named(node)} has the {name} {given[name]} and {named(mixer)} has {own[name]}; sizes are taken from one of them only"
    return None


def _refused_pool(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node, batch: tuple[Atom, ...]) -> str | None:
    largest = is_op(node, "amax", "amin") or (is_op(node, "max_dim") and all(user.args[1] == 0 for user in node.users))
    if largest or is_op(node.args[0], "weigh_tokens"):
        return None
    if not is_op(node, "mean", "sum"):
        return f"{named(node)} is {node.target}, which has no form that is weighted by size"
    if pooled(graph, axes, axis.atom, node, batch) is None:
        return f"{named(node)} pools the tokens together with what is not their batch: {tensor_type(node.args[0])}"  # type: ignore[arg-type]
    return None


def pooled(graph: Graph, axes: AxisFacts, whole: Atom, node: Node, batch: tuple[Atom, ...]) -> tuple[Atom, Layout] | None:
    """The axis that a sum or mean runs over and where it is in its input; None if it is not this axis or a tail of it."""
    x: Any = node.args[0]
    for atoms in axes.maps.get(x.name, ()):
        if len(atoms) == 1 and parts_of(axes, graph, atoms[0], whole) is not None:
            layout = layout_of(axes, x, atoms[0], batch)
            return (atoms[0], layout) if layout else None
    return None
