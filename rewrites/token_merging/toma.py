"""Merge tokens by a linear map for the length of one sublayer, and bring them back by its transpose; one map serves several sublayers.

x + f(x)  ->  x + map^T f(merge_by_map(x, map)),  map = assign_tokens(x, windows, n, temperature): T[B,K,T]

Destinations are chosen by facility location in windows of at most 16 neighbours (4 x 4 of a grid), n = (1 - ratio) * 16 in each; leading tokens
that are read by place are destinations of their own. The map is made from the value before the first of every REUSED sublayers of the stream.
Lossy; exact on equal tokens as the temperature goes to 0. Everything is a plain product of fixed shape; choosing n destinations takes n steps of
small ops, which is what reuse is for. Keys in a merged attention get the log of their sizes (the paper's do not).
Source: Lu et al. 2025, arXiv:2509.10918.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Block, Facts, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.token_merging.grid import grid_of
from paretorch.rewrites.token_merging.rows import rows_of
from paretorch.rewrites.token_merging.scoped import Scope, Shortened, constant_of, find_scope, merge_within, offer, sizes_of, tellers

NAME = "toma"
VALUES: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
WINDOW, TILE = 16, 4  # tokens of a window; along either side of it on a grid
REUSED = 6  # sublayers of one stream that share a map: three layers of two
TEMPERATURE = 0.1


def windows_of(graph: Graph, scope: Scope, ratio: float) -> tuple[Tensor, int]:
    """Windows of neighbours, i64[W,L], each filled up with its last token, and how many destinations are taken in each."""
    grid, protected = grid_of(graph, scope.facts.axes, scope.place.axis), scope.place.protected
    places = list(range(protected, int(scope.place.axis.atom.size)))
    if grid is not None:

        def tile(place: int) -> tuple[int, ...]:
            row, column = divmod(place - grid.first, grid.columns)
            return (row // TILE, column // TILE, row, column) if place >= grid.first else (-1, place)

        places.sort(key=tile)
    count = -(-len(places) // WINDOW)
    bounds = [number * len(places) // count for number in range(count + 1)]
    windows = [places[start:end] for start, end in pairwise(bounds)]
    longest, shortest = max(map(len, windows)), min(map(len, windows))
    filled = [window + window[-1:] * (longest - len(window)) for window in windows]
    return constant_of(tuple(map(tuple, filled))), min(shortest, max(1, round(longest * (1 - ratio))))


def kept_of(graph: Graph, scope: Scope, ratio: float) -> int:
    """How many tokens the sublayer works on."""
    windows, count = windows_of(graph, scope, ratio)
    return scope.place.protected + len(windows) * count


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per attention or feed-forward sublayer, named by the value after it."""

    def knobs(scope: Scope) -> tuple[Knob, ...] | str:
        tokens, protected = int(scope.place.axis.atom.size), scope.place.protected
        if tokens - protected < 2:
            return f"{tokens} tokens, {protected} of them read by place, leave none to merge"
        kept = {kept_of(graph, scope, ratio): ratio for ratio in reversed(VALUES[1:])}  # of equal counts the weakest
        values = sorted(ratio for count, ratio in kept.items() if count < tokens)
        return (VALUES[0], *values) if values else f"windows of {tokens} tokens, {protected} of them read by place, leave none to merge"

    return offer(NAME, graph, facts, knobs)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: the ratio of tokens merged away. Raises PlanError if the sublayer is gone or merging is not legal in it."""
    if not knob:
        return graph
    graph = graph.copy()
    facts = analyze(graph)
    scope = find_scope(graph, facts, site.name)
    if isinstance(scope, str):
        raise PlanError(f"{NAME} at {site.name}: {scope}")
    windows, count = windows_of(graph, scope, float(knob))
    leader = graph.node(_leader(facts, scope.block).before)
    assert leader is not None  # facts are of this graph

    def shorten(b: Builder, rows: Node, sizes: Node | None) -> Shortened:
        shares = _map(graph, scope, leader, windows, count, site.name)
        merged = b.merge_by_map(rows, shares, sizes)
        return Shortened(
            b.item(merged, 0), b.item(merged, 1),
            lambda at, other: at.item(at.merge_by_map(other, shares, sizes), 0), lambda at, other: at.unmerge_by_map(other, shares),
        )  # fmt: skip

    return merge_within(NAME, graph, scope, shorten) if kept_of(graph, scope, float(knob)) < scope.place.axis.atom.size else graph


def _leader(facts: Facts, block: Block) -> Block:
    """The first of the sublayers that share this one's map."""
    blocks = next(stream.blocks for stream in facts.streams if block in stream.blocks)
    place = blocks.index(block)
    return blocks[place - place % REUSED]


def _map(graph: Graph, scope: Scope, leader: Node, windows: Tensor, count: int, site: str) -> Node:
    """The map made from a value: one that is there already, or a new one."""
    protected, position = scope.place.protected, {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.calls:
        given = arguments(node) if is_op(node, "assign_tokens") else {}
        same = given.get("count") == count and given["protected"] == protected and _source(given["metric"]) is leader
        known = graph.known(given["windows"]) if same else None
        if known is not None and torch.equal(known, windows) and position[node] < position[scope.place.downstream[0]]:
            return node
    last = max([leader, *tellers(scope.told)], key=position.__getitem__)
    b = Builder(graph, last.next, origin=origin_of(leader), rule=NAME, site=site)
    rows = rows_of(b, leader, scope.place.layout)
    return b.assign_tokens(rows, sizes_of(b, scope.told), b.constant("windows", windows), count, protected, TEMPERATURE)


def _source(metric: Node) -> Node:
    """The value that these are the rows of."""
    while metric.meta.get("rule") == NAME and is_op(metric, "permute", "view"):
        metric = metric.all_input_nodes[0]
    return metric


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="ratio", values=VALUES), saves=("flops", "bytes", "memory"),
    source="arXiv:2509.10918", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"token_count", "grid"}),
)  # fmt: skip
