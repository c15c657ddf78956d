"""Where tokens may be merged: the attention whose keys say which are alike, the value of the stream to shorten, and all that forbids it.

Everything comes from dataflow: the token axis is an atom of the axis analysis, the place is the end of the attention's residual block, and
the uses of the axis downstream of it say what must stay (tokens selected by place), what must know the sizes (attention, sums, means) and
what cannot be shortened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, Facts, TokenAxis, Use
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match, is_reduction, lowered_by
from paretorch.rewrites.layer_skipping.skip import region
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs
from paretorch.rewrites.token_merging.clips import Clips, clips_of, needs_frames
from paretorch.rewrites.token_merging.frames import Frames, frames_of
from paretorch.rewrites.token_merging.reach import Cut, Reach, Start, reach_of
from paretorch.rewrites.token_merging.rows import Layout, layout_of
from paretorch.rewrites.token_merging.selections import leading_tokens, maxima, read_tokens, selected


@dataclass(frozen=True)
class Place:
    """mixer: the self-attention; value: the stream's value after its block; protected: leading tokens that must stay;
    downstream: all that will read merged tokens, in order; largest: the most tokens that may be merged; batch: the batch's atoms;
    cuts: where the tokens are brought back; read: the places of those of the leading tokens that the model reads one by one;
    room: as largest, for what need not leave half of them; frames: what tells that the tokens are frames, if anything does;
    clips: which rows of the batch are folded into one, if any are (all numbers are of tokens in one row before that); lowered: the values of all
    tokens that are brought down for what of `downstream` reads them; virtual: whether the mixer is such an attention; maxima: what of
    `downstream` takes the largest or the least of its rows."""

    mixer: Node
    value: Node
    axis: TokenAxis
    layout: Layout
    batch: tuple[Atom, ...]
    protected: int
    downstream: tuple[Node, ...]
    largest: int
    cuts: tuple[Cut, ...] = ()
    read: tuple[int, ...] = ()
    room: int = 0
    frames: Frames | None = None
    clips: Clips | None = None
    lowered: tuple[Node, ...] = ()
    virtual: bool = False
    maxima: tuple[Node, ...] = ()

    @property
    def fold(self) -> int:
        """How many rows of the batch become one here."""
        return self.clips.fold if self.clips else 1


def find_place(graph: Graph, facts: Facts, axis: TokenAxis, name: str, folds: bool = False) -> Place | str:
    """The place that belongs to one self-attention, or a sentence that says what forbids it. folds: whether frames in the batch are joined."""
    nodes = {node.name: node for node in graph.nodes}
    mixer, atom = nodes[name], axis.atom
    if not is_op(mixer, "attention"):
        return f"{named(mixer)} is {mixer.target}, which is not recognised as attention or is local already"
    hidden = hides_later(nodes, axis)
    if hidden:
        return hidden
    if not isinstance(atom.size, int):
        return f"{named(mixer)} runs over {atom.size} tokens, a number not known before it runs"
    value = end_of_block(facts, nodes, mixer)
    if value is None:
        return f"{named(mixer)} stands in no block of a residual stream, so there is no one value that carries the tokens on"
    batch = batch_of(facts.axes, mixer)
    layout = layout_of(facts.axes, value, atom, batch)
    if layout is None:
        return f"the {atom.size} tokens of {named(mixer)} are not one dimension beside its batch in {value.name}: {tensor_type(value)}"
    downstream = computed_from(graph, value)
    taken = next((node for node in downstream if is_reduction(node) and _takes(node, value)), None)
    if taken is not None:
        return f"tokens are merged after {named(mixer)} already, by {taken.meta.get('rule') or taken.name}"
    clips = clips_of(graph, facts, named(mixer), batch, downstream) if folds else None
    if isinstance(clips, str):
        return clips
    reach = _forbidden(graph, facts, axis, mixer, value, downstream, batch, clips)
    if isinstance(reach, str):
        return reach
    protected, read = leading_tokens(graph, facts.axes, axis, downstream), read_tokens(graph, facts.axes, axis, downstream)
    room = min([atom.size - protected - 1, *(_slack(node) for node in reach.merged if is_match(node))])
    largest, frames = min((atom.size - protected) // 2, room), frames_of(graph, facts.axes, axis)
    virtual, extremes = bool(lowered_by(mixer)), maxima(graph, facts.axes, axis, reach.merged)
    return Place(
        mixer, value, axis, layout, batch, protected, reach.merged, largest, reach.cuts, read, room, frames, clips, reach.lowered, virtual,
        extremes,
    )  # fmt: skip


def named(node: Node) -> str:
    """The node with its place in the user's model."""
    return f"{node.name} ({origin_of(node)})"


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


def batch_of(axes: AxisFacts, mixer: Node) -> tuple[Atom, ...]:
    key = arguments(mixer)["key"]
    return axes.maps[key.name][0] if key.name in axes.maps else ()


def end_of_block(facts: Facts, nodes: dict[str, Node], mixer: Node) -> Node | None:
    """The value after the block that this attention is part of; of several the one that begins last, as one may hold the whole model."""
    position = {node: number for number, node in enumerate(nodes.values())}
    blocks = [block for stream in facts.streams for block in stream.blocks]
    for block in sorted(blocks, key=lambda block: -position[nodes[block.before]]):
        before, after = nodes[block.before], nodes[block.after]
        near = position[before] < position[mixer] < position[after]
        if near and (mixer.name in block.nodes or mixer in region(before, after, position)):
            return after
    return None


def hides_later(nodes: dict[str, Node], axis: TokenAxis) -> str | None:
    """A sentence about the first attention on this axis that may hide later tokens from earlier ones; None if all see as far to either side."""
    for name in axis.mixers if axis.causal else ():
        node = nodes[name]
        right, known = arguments(node).get("right", -1), is_op(node, "attention", "local_attention")
        pairs = mask_by_pairs(node) if is_op(node, "attention") and right < 0 else None
        if known and (right > 0 or (right < 0 and not pairs)):
            continue  # a window hides by distance only
        leaks = "merging tokens, or choosing which to drop, leaks what comes later into what comes before"
        return pairs or f"{named(node)} hides later tokens from earlier ones; {leaks}"
    return None


def computed_from(graph: Graph, value: Node) -> tuple[Node, ...]:
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


def _slack(node: Node) -> int:
    """How many tokens fewer a later match could have and still find its count."""
    given, tokens = arguments(node), node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    return int(tokens) - int(given["protected"]) - int(given["count"]) - int(given.get("contextual", given["count"]))


def _forbidden(
    graph: Graph, facts: Facts, axis: TokenAxis, mixer: Node, value: Node, downstream: Sequence[Node], batch: tuple[Atom, ...],
    clips: Clips | None = None,
) -> Reach | str:  # fmt: skip
    """What a merge of the value reaches; a sentence about the first thing that needs all tokens if that leaves nothing to save."""
    whole = needs_all(graph, facts, axis, mixer, downstream, batch)
    if clips is not None:
        whole = _either(whole, needs_frames(graph, facts, axis, clips))

    @cache
    def inside(before: Node) -> set[Node]:
        return _block_after(graph, facts, before)

    reach = reach_of(Start(facts.axes, axis, value, batch, whole, inside, clips, may_be_virtual=clips is None), downstream)
    if not reach.merged or ((reach.cuts or reach.lowered) and not reach.works):
        reason = reach.cuts[0].reason if reach.cuts else next((why for node in downstream if (why := whole(node))), _unread(value, axis))
        return f"{reason}; no product between {value.name} and there would run on fewer tokens"
    return reach


def needs_all(
    graph: Graph, facts: Facts, axis: TokenAxis, mixer: Node | None, downstream: Sequence[Node], batch: tuple[Atom, ...]
) -> Callable[[Node], str | None]:
    """Why a node downstream must see all tokens of the axis in their places, None if it need not. mixer: from whose mask the sizes come."""
    uses = defaultdict(list)
    for use in _uses(axis, downstream):
        uses[use.node].append(use)

    @cache
    def whole(node: Node) -> str | None:
        reasons = (_refused_use(graph, facts.axes, axis, mixer, node, use, batch) for use in uses[node.name] if use.kind != "returns")
        return paired_rows(facts.axes, axis, (node,), batch) or next((reason for reason in reasons if reason), None)

    return whole


def _either(first: Callable[[Node], str | None], second: Callable[[Node], str | None]) -> Callable[[Node], str | None]:
    return lambda node: first(node) or second(node)


def _unread(value: Node, axis: TokenAxis) -> str:
    """Why the value at the end of a block has no use on merged tokens."""
    return f"the model returns {named(value)}, {tensor_type(value)}, with one entry for each of the {axis.atom.size} tokens"


def _block_after(graph: Graph, facts: Facts, before: Node) -> set[Node]:
    """The nodes of the residual block that begins with a value, up to the value after it."""
    ends = [block.after for stream in facts.streams for block in stream.blocks if block.before == before.name]
    if not ends:
        return set()
    position = {node: number for number, node in enumerate(graph.nodes)}
    nodes = {node.name: node for node in position}
    return set().union(*(region(before, nodes[end], position) for end in ends))


def paired_rows(axes: AxisFacts, axis: TokenAxis, downstream: Sequence[Node], batch: tuple[Atom, ...]) -> str | None:
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


def pooled_softly(graph: Graph, axes: AxisFacts, whole: Atom, node: Node) -> bool:
    """Whether a node is part of an average by a softmax over the tokens, which counts sizes by itself."""
    from paretorch.rewrites.token_merging import soft_pool

    return soft_pool.pooled_softly(graph, axes, whole, node)


def _refused_use(
    graph: Graph, axes: AxisFacts, axis: TokenAxis, mixer: Node | None, node: Node, use: Use, batch: tuple[Atom, ...]
) -> str | None:
    if use.kind == "mixes":
        return _refused_mixing(graph, axes, axis, mixer, node)
    if use.kind == "pools":
        return use.reason or _refused_pool(graph, axes, axis, node, batch)
    if use.kind == "selects":
        plain = not use.reason and selected(graph, axes, axis.atom, node) >= 0
        moved = f"{named(node)} selects tokens by a place that merging moves: only leading tokens keep theirs"
        return None if plain else use.reason or moved
    if use.kind == "appends":
        return use.reason or f"{named(node)} joins the {axis.atom.size} tokens with others along their axis"
    if use.kind == "positions":
        return use.reason or f"{named(node)} adds something for each position"
    return use.reason or None  # opaque and baked lengths; a view that names the length is repaired


def _refused_mixing(graph: Graph, axes: AxisFacts, axis: TokenAxis, mixer: Node | None, node: Node) -> str | None:
    if pooled_softly(graph, axes, axis.atom, node):
        return None
    if not is_op(node, "attention"):
        kind = "attends to a window of places" if is_op(node, "local_attention") else f"mixes tokens by {node.target}, not as one attention"
        return f"{named(node)} {kind}"
    given = arguments(node)
    if given["left"] >= 0 or given["right"] >= 0:
        return f"{named(node)} lets a query see keys by their places ({given['left']} before, {given['right']} after it)"
    pairs = mask_by_pairs(node)
    if pairs:
        return pairs
    key = axes.maps[given["key"].name][-2] if given["key"].name in axes.maps else ()
    if len(key) != 1 or parts_of(axes, graph, key[0], axis.atom) is None:
        own_bias = given["mask"] is not None or (given["key_bias"] is not None and not is_op(given["key_bias"], "log_size"))
        masked = len(key) == 1 and is_match(graph.node(key[0].born)) and own_bias
        # its keys are others, or rows that a later match made: their sizes come from there, but for a mask of its own
        left = f"{given['mask'] or given['key_bias']}, on what an earlier step left of the tokens"
        return f"{named(node)} has a mask of its own, {left}" if masked else None
    if mixer is not None and lowered_by(mixer):
        return None  # its tokens are an earlier step's, as this attention's are
    own = arguments(mixer) if mixer is not None else given
    for name in ("mask", "key_bias"):
        if given[name] is not own[name] and own["key"] is not given["key"]:
            other = f"{mixer.name if mixer else node.name} has {own[name]}"
            return f"{named(node)} has the {name} {given[name]} and {other}; sizes are taken from one of them only"
    return None


def _refused_pool(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node, batch: tuple[Atom, ...]) -> str | None:
    largest = is_op(node, "amax", "amin") or (is_op(node, "max_dim") and all(user.args[1] == 0 for user in node.users))
    if largest or is_op(node.args[0], "weigh_tokens") or pooled_softly(graph, axes, axis.atom, node):
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
