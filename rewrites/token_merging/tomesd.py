"""Merge tokens into fixed destinations for the length of one sublayer, and bring them back after it.

x + f(x)  ->  x + unmerge_tokens(f(merge_tokens(x, match)), map),  match = match_to_places(x, destinations, sources, r), r = ratio * T

Destinations are the first token of every 2 x 2 cell where the tokens were made from a grid, else every fourth token; the r tokens most like
one of them join it. Leading tokens that are read by place are neither. Lossy; exact where the merged tokens are equal. The stream keeps all tokens, so
that it is legal wherever the sublayer is a function of its own tokens. Keys in a merged attention get the log of their sizes (the paper's do not).
Source: Bolya & Hoffman 2023, arXiv:2303.17604; the cells' first tokens are its setting without randomness.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from paretorch.ir.analyze import Facts, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.token_merging.grid import grid_of
from paretorch.rewrites.token_merging.scoped import Scope, Shortened, constant_of, find_scope, merge_within, offer

NAME = "tomesd"
VALUES: tuple[float, ...] = (0.0, 0.25, 0.5, 0.625, 0.75)
CELL = 2  # tokens along either side of a grid's cell; in a line, CELL * CELL


def destinations_of(graph: Graph, scope: Scope) -> tuple[list[int], list[int]]:
    """Places of the destinations and of the sources, in order; leading tokens that are read by place are in neither."""
    axis, protected = scope.place.axis, scope.place.protected
    grid = grid_of(graph, scope.facts.axes, axis)
    tokens = int(axis.atom.size)
    if grid is not None and grid.first >= protected:
        cells = [grid.first + row * grid.columns + column for row in range(0, grid.rows, CELL) for column in range(0, grid.columns, CELL)]
        return cells, [token for token in range(grid.first, tokens) if token not in set(cells)]
    line = list(range(protected, tokens, CELL * CELL))
    return line, [token for token in range(protected, tokens) if token not in set(line)]


def count_of(graph: Graph, scope: Scope, ratio: float) -> int:
    """Tokens merged away: the ratio of all, at most all sources."""
    return min(int(scope.place.axis.atom.size * ratio), len(destinations_of(graph, scope)[1]))


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per attention or feed-forward sublayer, named by the value after it."""

    def knobs(scope: Scope) -> tuple[Knob, ...] | str:
        counts = {count_of(graph, scope, ratio): ratio for ratio in reversed(VALUES)}  # of equal counts the weakest
        values = tuple(sorted(counts.values()))
        few = f"{scope.place.axis.atom.size} tokens, {scope.place.protected} of them read by place, leave none to merge"
        return values if len(values) > 1 else few

    return offer(NAME, graph, facts, knobs)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: the ratio of tokens merged away. Raises PlanError if the sublayer is gone or merging is not legal in it."""
    if not knob:
        return graph
    graph = graph.copy()
    scope = find_scope(graph, analyze(graph), site.name)
    if isinstance(scope, str):
        raise PlanError(f"{NAME} at {site.name}: {scope}")
    count = count_of(graph, scope, float(knob))
    destinations, sources = (constant_of(tuple(places)) for places in destinations_of(graph, scope))

    def shorten(b: Builder, rows: Node, sizes: Node | None) -> Shortened:
        to, away = b.constant("destinations", destinations), b.constant("sources", sources)
        match = b.match_to_places(rows, sizes, to, away, count)
        indices = [b.item(match, number) for number in range(3)]
        merged, places = b.merge_tokens(rows, *indices, sizes), b.source_map(*indices)
        return Shortened(
            b.item(merged, 0), b.item(merged, 1),
            lambda at, other: at.item(at.merge_tokens(other, *indices, sizes), 0), lambda at, other: at.unmerge_tokens(other, places),
        )  # fmt: skip

    return merge_within(NAME, graph, scope, shorten) if count > 0 else graph


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="ratio", values=VALUES), saves=("flops", "bytes", "memory"),
    source="arXiv:2303.17604", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"token_count", "grid"}),
)  # fmt: skip
