"""What all rules that make the tokens of the rest of a graph fewer share: their sites, their rewrite, and what they are given at a place.

A technique says how many tokens go at a value of its knob and emits how they go. What follows from that (sizes as the bias of later keys,
padding as size 0, weights per token, sums and means, later steps, lengths, tokens that are read by place, tokens brought back where all are
needed) is derived for all of them by `paretorch.rewrites.token_merging.carry`. One step takes at most half of the tokens that may go, unless its
technique says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from paretorch.ir.analyze import AxisFacts, Facts, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import ParetorchError, PlanError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops.tokens import is_match
from paretorch.rewrites.rule import Knob, Refusal, Site
from paretorch.rewrites.token_merging.carry import Reducer, reduce_at
from paretorch.rewrites.token_merging.place import Place, find_place
from paretorch.rewrites.token_merging.reach import Cut
from paretorch.rewrites.token_merging.selections import whole_of
from paretorch.rewrites.token_merging.virtual import brought_down_as

SHARES: tuple[float, ...] = (0.0, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48)  # of the tokens that might go, for any length
SMALLEST = 64  # a step of less than this part of the tokens is not offered beside larger ones: of many values each would be measured


@dataclass(frozen=True)
class Step:
    """One use of a technique. b: where its nodes go; size: T[B,T], None if all are one; count: how many tokens go; knob: as it was given;
    whole: how many tokens that might go the model begins with; depth: the share of the self-attentions over these tokens that come before this
    one, 0 for the first."""

    b: Builder
    place: Place
    size: Node | None
    count: int
    knob: Knob
    whole: int
    depth: float

    def metric(self) -> Node:
        """What tells which tokens are alike, see `metric_of`."""
        return metric_of(self.b, self.place)


@dataclass(frozen=True)
class Technique:
    """One progressive rule.

    forms: its knob's values, the identity first, then weaker to stronger; each form is offered, and its loss measured, on its own.
    count: (knob, how many tokens might go where the model begins with them) -> how many go; emit: what to put at a place.
    refuse: a sentence for a place that has not what the technique needs; largest: the most tokens that it may take at a place;
    folds: whether it joins frames that are rows of the batch, and counts the tokens of those that become one row.
    """

    name: str
    forms: tuple[tuple[Knob, ...], ...]
    count: Callable[[Knob, int], int]
    emit: Callable[[Step], Reducer]
    refuse: Callable[[Place], str | None] = lambda place: None
    largest: Callable[[Place], int] = lambda place: place.largest
    folds: bool = False

    @property
    def identity(self) -> Knob:
        return self.forms[0][0]

    @property
    def values(self) -> tuple[Knob, ...]:
        """All values of the knob, the identity first."""
        return (self.identity, *(value for form in self.forms for value in form[1:]))


def metric_of(b: Builder, place: Place) -> Node:
    """What tells which tokens are alike at a place, T[B,T,D]: the mean over heads of the attention's keys."""
    rows = b.mean(arguments(place.mixer)["key"], [1])
    return brought_down_as(b, place.mixer, rows) if place.virtual else rows


def count_of_share(share: Knob, tokens: int) -> int:
    """How many of so many tokens a share is."""
    return int(float(share or 0) * tokens + 1e-9)


def offer(technique: Technique, graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The sites of a technique, or a refusal, for each self-attention; they are named by its node."""
    name = technique.name
    for axis in facts.axes.tokens:
        # A step that works proves those that reach no more than it does, as later ones mostly do.
        again, proven = is_match(graph.node(axis.atom.born)), set[Node | Cut]()
        for mixer in axis.mixers:
            place = find_place(graph, facts, axis, mixer, technique.folds)
            refusal = place if isinstance(place, str) else technique.refuse(place)
            if isinstance(place, str) or refusal:
                yield Refusal(name, mixer, str(refusal))
                continue
            found = _sites(technique, graph, facts.axes, place)
            if isinstance(found, str):
                yield Refusal(name, mixer, found)
                continue
            reached: set[Node | Cut] = {*place.downstream, *place.cuts, *place.lowered}
            fault = None if again or reached <= proven else _fault(technique, graph, found[0])
            proven |= reached if fault is None else set()
            yield from [Refusal(name, mixer, fault)] if fault else found


def _sites(technique: Technique, graph: Graph, axes: AxisFacts, place: Place) -> list[Site] | str:
    """One site for each form with the values that take a noticeable part of the tokens, and not more than may go; a sentence if there is none."""
    size, protected, label = place.axis.atom.size, place.protected, origin_of(place.mixer).path or place.mixer.name
    free, largest = free_tokens(graph, axes, place), technique.largest(place)
    found = []
    for identity, *values in technique.forms:
        first: dict[int, Knob] = {}
        for value in values:
            first.setdefault(technique.count(value, free), value)
        possible = [count for count in first if 0 < count <= largest]
        legal = tuple(first[count] for count in possible if count * SMALLEST >= free or count == possible[-1])
        if legal:
            found.append(Site(place.mixer.name, label, (identity, *legal)))
    if found:
        return found
    smallest = min((count for form in technique.forms for value in form[1:] if (count := technique.count(value, free)) > 0), default=1)
    return f"{size} tokens, {protected} of them read by place, leave at most {largest} to merge; the smallest step is {smallest}"


def _fault(technique: Technique, graph: Graph, site: Site) -> str | None:
    """What goes wrong when the weakest step is tried; None if nothing does."""
    assert site.values is not None  # _sites names them
    try:
        shorten(technique, graph, site, site.values[1])
    except ParetorchError as error:
        return str(error)
    return None


def shorten(technique: Technique, graph: Graph, site: Site, knob: Knob) -> Graph:
    """The graph with fewer tokens after the site. How many go is cut to what the tokens left here allow.

    Raises PlanError if the site is gone or the technique is not legal there.
    """
    if knob == technique.identity:
        return graph
    graph = graph.copy()
    facts = analyze(graph)
    place = place_at(technique, graph, facts, site)
    whole = free_tokens(graph, facts.axes, place)
    count = min(technique.count(knob, whole), technique.largest(place))
    if count <= 0:
        return graph
    depth = _depth(graph, facts.axes, place)
    return reduce_at(
        graph, facts.axes, place, technique.name, lambda b, size: technique.emit(Step(b, place, size, count, knob, whole, depth))
    )


def place_at(technique: Technique, graph: Graph, facts: Facts, site: Site) -> Place:
    """The place that a site names. Raises PlanError if it is gone or the technique is not legal there."""
    axis = next((axis for axis in facts.axes.tokens if site.name in axis.mixers), None)
    if axis is None:
        raise PlanError(f"{technique.name}: no self-attention is named {site.name} here; an earlier rewrite took it out or changed it")
    place = find_place(graph, facts, axis, site.name, technique.folds)
    refusal = place if isinstance(place, str) else technique.refuse(place)
    if isinstance(place, str) or refusal:
        raise PlanError(f"{technique.name} at {site.name}: {refusal}")
    return place


def free_tokens(graph: Graph, axes: AxisFacts, place: Place) -> int:
    """How many tokens the model begins with that are not read by place: what shares are of, in whichever order steps are put in."""
    return (int(whole_of(graph, axes, place.axis.atom).size) - place.protected) * place.fold


def _depth(graph: Graph, axes: AxisFacts, place: Place) -> float:
    """The share of the self-attentions over these tokens, however many are left of them there, that come before this one."""
    whole = whole_of(graph, axes, place.axis.atom)
    mixers = {name for axis in axes.tokens if whole_of(graph, axes, axis.atom) == whole for name in axis.mixers}
    ordered = [node.name for node in graph.nodes if node.name in mixers]
    return ordered.index(place.mixer.name) / len(ordered)
