"""What rules share that merge tokens for the length of one sublayer: where that is legal, and the graph with it.

before + f(before)  ->  before + unmerge(f(merge(before)))

The stream keeps all tokens, so nothing after the sublayer is concerned. The sublayer itself must be a function of its own tokens: what it
computes may mix them by attention (whose keys get the log of their sizes) but not read their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Atom, Block, Facts, TokenAxis, rederive_lengths
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.tokens import is_match, is_reduction
from paretorch.rewrites.layer_skipping.skip import blocks_of, region
from paretorch.rewrites.rule import Knob, Refusal, Site
from paretorch.rewrites.sparse_attention.key_bias import is_table
from paretorch.rewrites.token_merging.carry import Carrier, is_silent, sizes_before
from paretorch.rewrites.token_merging.companions import merge_companions
from paretorch.rewrites.token_merging.place import Place, batch_of, computed_from, hides_later, named, needs_all
from paretorch.rewrites.token_merging.reach import PRODUCTS, Start, reach_of
from paretorch.rewrites.token_merging.rows import layout_of, restored, rows_of
from paretorch.rewrites.token_merging.selections import leading_tokens
from paretorch.rewrites.token_merging.unmerge import close_seams, open_seams

END = "the sublayer ends there"


@dataclass(frozen=True)
class Scope:
    """facts: of the graph as it is; place: its value is the stream's value before the sublayer; told: the attention or the match that knows the
    tokens' sizes, None if all are one."""

    facts: Facts
    block: Block
    place: Place
    told: Node | None


@dataclass(frozen=True)
class Shortened:
    """rows: [B,T',C]; sizes: [B,T']; merge: (builder, other rows [B,T,D]) -> [B,T',D]; bring_back: (builder, rows [B,T',D]) -> [B,T,D]."""

    rows: Node
    sizes: Node
    merge: Callable[[Builder, Node], Node]
    bring_back: Callable[[Builder, Node], Node]


def offer(rule: str, graph: Graph, facts: Facts, knobs: Callable[[Scope], tuple[Knob, ...] | str]) -> Iterator[Site | Refusal]:
    """A site, or a refusal, for each attention and feed-forward sublayer, named by the value after it.

    knobs: its legal values, or why there are none.
    """
    for block in blocks_of(facts):
        if block.kind not in ("attention", "feed_forward"):
            continue
        scope = _scope(graph, facts, block)
        values = scope if isinstance(scope, str) else knobs(scope)
        label = origin_of(graph.node(block.after)).path or block.after  # type: ignore[arg-type]
        yield Refusal(rule, block.after, values) if isinstance(values, str) else Site(block.after, label, values)


@cache
def constant_of(places: tuple[Any, ...]) -> Tensor:
    """The same tensor for the same places, so that sites share a constant."""
    return torch.tensor(places)


def find_scope(graph: Graph, facts: Facts, name: str) -> Scope | str:
    """The sublayer that ends in the value of that name, or a sentence that says what forbids merging in it."""
    block = next((block for block in blocks_of(facts) if block.after == name), None)
    gone = f"no sublayer ends in {name}; an earlier rewrite took it out or changed it"
    return gone if block is None else _scope(graph, facts, block)


def _scope(graph: Graph, facts: Facts, block: Block) -> Scope | str:
    """The sublayer as a place where tokens may be merged, or a sentence that says what forbids it."""
    nodes = {node.name: node for node in graph.nodes}
    before, after = nodes[block.before], nodes[block.after]
    found = _axis(graph, facts, before)
    if found is None:
        return f"no axis that attention mixes is one dimension, beside its batch, of {before.name}: {tensor_type(before)}"
    axis, batch = found
    layout, hidden = layout_of(facts.axes, before, axis.atom, batch), hides_later(nodes, axis)
    assert layout is not None  # _axis looks for one
    if hidden:
        return hidden
    if not isinstance(axis.atom.size, int):
        return f"{before.name} has {axis.atom.size} tokens, a number not known before it runs"
    position = {node: number for number, node in enumerate(nodes.values())}
    inside, downstream = region(before, after, position), computed_from(graph, before)
    mixer = next((nodes[name] for name in axis.mixers if nodes[name] in inside and is_op(nodes[name], "attention")), None)
    needed = needs_all(graph, facts, axis, mixer, downstream, batch)

    def forbidden(node: Node) -> str | None:
        return f"{named(node)} brings tokens back that an earlier step merged" if is_op(node, "unmerge_tokens") else needed(node)

    ends = _ends(before, inside, position)
    if not ends:
        return f"{after.name} ({origin_of(after)}) does not add to {before.name}"
    start = Start(
        facts.axes, axis, before, batch, lambda node: END if node in ends or node not in inside else forbidden(node), lambda node: set()
    )
    reach = reach_of(start, downstream)
    reason = next((cut.reason for cut in reach.cuts if cut.reason != END), None)
    works = [node for node in inside if (op := op_of(node)) is not None and op.kind in PRODUCTS]
    outside = next((node for node in sorted(works, key=position.__getitem__) if node not in reach.merged), None)
    if reason or outside is not None or not works:
        return reason or f"{named(outside) if outside else before.name} is no function of the merged tokens"
    told = mixer or _told(graph, facts, axis, position, before)
    own = next((node for node in _sources(tellers(told)) if node in reach.merged), None)
    if own is not None:
        return f"what says which tokens are padding is computed from {own.name}, inside of the sublayer"
    protected = leading_tokens(graph, facts.axes, axis, computed_from(graph, nodes[axis.atom.born]))
    place = Place(mixer or before, before, axis, layout, batch, protected, reach.merged, axis.atom.size - protected, reach.cuts)
    return Scope(facts, block, place, told)


def _axis(graph: Graph, facts: Facts, value: Node) -> tuple[TokenAxis, tuple[Atom, ...]] | None:
    """The token axis that is a dimension of the value, and its batch."""
    for axis in facts.axes.tokens:
        for batch in _batches(graph, facts, axis):
            if layout_of(facts.axes, value, axis.atom, batch) is not None:
                return axis, batch
    return None


def _batches(graph: Graph, facts: Facts, axis: TokenAxis) -> list[tuple[Atom, ...]]:
    """The batch of the axis, as attention over it has it, or what brings its tokens back."""
    nodes, maps = {node.name: node for node in graph.nodes}, facts.axes.maps
    attentions = [nodes[name] for name in axis.mixers if is_op(nodes[name], "attention", "local_attention")]
    brought = [node.name for node in graph.calls if is_op(node, "unmerge_tokens", "unmerge_by_map")]
    over = [maps[name][0] for name in brought if name in maps and maps[name][1] == (axis.atom,)]
    return [*(batch_of(facts.axes, node) for node in attentions[:1]), *over[:1]]


def _ends(before: Node, inside: set[Node], position: dict[Node, int]) -> set[Node]:
    """The sums to which the value itself is added, also by way of another such sum, with the casts and scalings that stand between."""
    ends: set[Node] = set()
    for node in sorted(inside, key=position.__getitem__):
        for operand in node.all_input_nodes if is_op(node, "add") else ():
            chain = [node]
            while operand is not before and is_op(operand, "to", "clone", "alias", "mul") and len(operand.all_input_nodes) == 1:
                chain.append(operand)
                operand = operand.all_input_nodes[0]
            ends |= set(chain) if operand is before or operand in ends else set()
    return ends


def _told(graph: Graph, facts: Facts, axis: TokenAxis, position: dict[Node, int], before: Node) -> Node | None:
    """Who knows the sizes of the tokens: of the attentions over them and the matches of them the last one before the value, else the first after it.

    Where all of these run on tokens that an earlier step merged, what left them of more does.
    """
    maps, found, left = facts.axes.maps, [], []
    for node in graph.calls:
        over = arguments(node)["key"] if is_op(node, "attention") else node.args[0] if is_match(node) else None
        dims: Any = maps.get(over.name) if isinstance(over, Node) else None
        if dims is not None and dims[-2 if is_op(node, "attention") else 1] == (axis.atom,) and tellers(node):
            found.append(node)
        rows = node.args[1] if is_reduction(node) else None
        if isinstance(rows, Node) and maps.get(rows.name, ((), ()))[1] == (axis.atom,) and tellers(node):
            left.append(node)
    ahead = [node for node in found if position[node] <= position[before]]
    return ahead[-1] if ahead else found[0] if found else left[0] if left else None


def tellers(told: Node | None) -> list[Node]:
    """The operands by which an attention or a match knows sizes; a reduction itself, unless it dropped tokens while all were one."""
    if told is None or is_silent(told):
        return []
    if is_reduction(told):
        return [told]
    given = arguments(told)
    names = ("key_bias",) if is_op(told, "attention") and is_table(told) else ("mask", "key_bias", "size")
    return [given[name] for name in names if isinstance(given.get(name), Node)]


def _sources(nodes: Sequence[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _move_ahead(graph: Graph, nodes: Sequence[Node], first: Node) -> None:
    """Let the nodes, which do not depend on `first`, be computed before it."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    late = [node for node in _sources(nodes) if position[node] > position[first]]
    for node in sorted(late, key=position.__getitem__):
        first.prepend(node)


def sizes_of(b: Builder, told: Node | None) -> Node | None:
    """The sizes of the tokens, T[B,T]; None if all are one."""
    if told is None:
        return None
    if is_reduction(told):
        return b.item(told, 1)
    return arguments(told)["size"] if is_match(told) else sizes_before(b, told)


def merge_within(rule: str, graph: Graph, scope: Scope, shorten: Callable[[Builder, Node, Node | None], Shortened]) -> Graph:
    """The graph, edited in place, with fewer tokens inside of the sublayer.

    shorten: (builder, rows [B,T,C], their sizes) -> what stands for them.
    """
    place, axes = scope.place, scope.facts.axes
    _move_ahead(graph, tellers(scope.told), place.downstream[0])
    b = Builder(graph, place.downstream[0], origin=origin_of(place.value), rule=rule, site=scope.block.after)
    short = shorten(b, rows_of(b, place.value, place.layout), sizes_of(b, scope.told))
    merged = restored(b, short.rows, place.value, place.layout)
    for node in place.downstream:
        node.replace_input_with(place.value, merged)
    merge_companions(graph, axes, place, b, short.merge)
    seams = open_seams(graph, axes, place)
    Carrier(graph, axes, place, b, short.sizes).carry()
    rederive_lengths(graph, axes, {merged.name: (place.axis.atom, tensor_type(short.rows).shape[1])})
    close_seams(graph, axes, place, seams, b, short.bring_back)
    return graph.clean()
