"""Merge all pairs of tokens that are alike enough, so that each sample keeps a number of tokens of its own.

x = block(x)  ->  x, size = merge_ragged(block(x), match_above(mean over heads of the keys, size, r, threshold), size)

Pairs are found as in `tome`. Shapes are fixed, so what is left stands in T - r rows: rows that no token needs have size 0, as padding has, and no
real token, pool or output sees them; a sample with more tokens left than rows merges its most similar further pairs, which is then `tome`'s choice.
Lossy; exact where the merged tokens are equal. Time is saved by the r rows that are gone, as with `tome`, and so it is priced; a generated attention
kernel also leaves out the rows behind the last real one. What is merged beyond r is merged early, where it is alike, instead of later, where the next
step must find pairs for r more rows: there it takes the empty ones first.

The knob is a share of the tokens and a threshold, "0.08 above 0.9912": r is that share, and the threshold is measured for each layer and share
on the user's data (`calibrate`), so that a sample merges r pairs on average; before data are seen it is 0.9. Paper: thresholds from 250,000 images.
Refused where the largest of all rows is taken. Attention that reads places sees all tokens (virtual unmerging), and no empty rows.
Source: Wang et al. 2025, arXiv:2504.17040. The quality of the paper's models: not measured, as none is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops.tokens import best_partners
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Rule, Site
from paretorch.rewrites.token_merging.carry import Reducer, sizes_of
from paretorch.rewrites.token_merging.place import Place, named
from paretorch.rewrites.token_merging.progressive import (
    SHARES,
    Step,
    Technique,
    count_of_share,
    free_tokens,
    metric_of,
    offer,
    place_at,
    shorten,
)

NAME = "dymu"
BETWEEN = " above "
UNSEEN = 0.9  # the threshold before data are seen
DIGITS = 4  # of a threshold: rounding of the cosines stays behind them
VALUES: tuple[Knob, ...] = (0.0, *(f"{share}{BETWEEN}{UNSEEN}" for share in SHARES[1:]))


def emit(step: Step) -> Reducer:
    b, size = step.b, step.size
    match = b.match_above(step.metric(), size, step.count, step.place.protected, _parts(step.knob)[1])
    indices = (b.item(match, 0), b.item(match, 1), b.item(match, 2))

    def rows(at: Builder, x: Node) -> Node:
        return at.merge_ragged(x, *indices, size)

    return Reducer(indices, rows, lambda at, weights: at.item(rows(at, weights), 0), places=b.item(match, 3))


def refuse(place: Place) -> str | None:
    """A sentence where a row that stands for no token would be seen."""
    if not place.maxima:
        return None
    return f"{named(place.maxima[0])} is {place.maxima[0].target} over all rows, and one that stands for no token could be it"


def count(knob: Knob, tokens: int) -> int:
    return count_of_share(_parts(knob)[0], tokens)


def _parts(knob: Knob) -> tuple[float, float]:
    """(share, threshold) of a knob that is not the identity. Raises PlanError if it is none of this rule's."""
    share, _, threshold = str(knob).partition(BETWEEN)
    try:
        return float(share), float(threshold)
    except ValueError as error:
        raise PlanError(f"{NAME} takes a share and a threshold, as in {VALUES[1]!r}, not {knob!r}") from error


TECHNIQUE = Technique(NAME, (VALUES,), count, emit, refuse)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def calibrate(graph: Graph, sites: Sequence[Site], batches: Iterable[Sequence[Tensor]]) -> list[Site]:
    """The sites with thresholds for these inputs, each a flat tuple of the graph's.

    The cosines of a batch's pairs, in order, are cut off where as many are above as the share takes from its samples; the mean over the batches is
    the threshold, 0 at least, and 1 where padding is all that goes. Measured on the graph as it is, whatever a plan merges before.
    Raises PlanError if a site is gone or not legal.
    """
    looked = graph.copy()
    facts, b = analyze(looked), Builder(looked, looked.output_node)
    places = [place_at(TECHNIQUE, looked, facts, site) for site in sites]
    metrics, known = [metric_of(b, place) for place in places], [sizes_of(b, place) for place in places]
    counts = [
        [count(knob, free_tokens(looked, facts.axes, place)) for knob in _values(site)] for site, place in zip(sites, places, strict=True)
    ]
    looked.set_outputs([*metrics, *(size for size in known if size is not None)])
    looked.clean()
    cuts: list[list[list[float]]] = [[] for _ in sites]
    for inputs in batches:
        found = list(looked.run(*inputs))
        sizes = iter(found[len(sites) :])
        for number, place in enumerate(places):
            best, _ = best_partners(found[number], None if known[number] is None else next(sizes), place.protected)
            scores = torch.sort(best.flatten(), descending=True)[0].clamp(0.0, 1.0)
            cuts[number].append([float(scores[each * len(best) - 1]) for each in counts[number]])
    return [replace(site, values=(VALUES[0], *_measured(_values(site), found))) for site, found in zip(sites, cuts, strict=True)]


def _values(site: Site) -> tuple[Knob, ...]:
    return (site.values or VALUES)[1:]


def _measured(knobs: Sequence[Knob], cuts: Sequence[Sequence[float]]) -> list[Knob]:
    """The shares of these knobs with the means of what was found for each in the batches."""
    means = [round(fmean(each), DIGITS) for each in zip(*cuts, strict=True)]
    return [f"{_parts(knob)[0]}{BETWEEN}{mean}" for knob, mean in zip(knobs, means, strict=True)]


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share above cosine", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2504.17040", example=example, sites=sites, rewrite=rewrite, calibrate=calibrate,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
