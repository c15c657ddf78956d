"""Merge tokens that have many like them, and leave alone those that stand apart.

x = block(x)  ->  x, size = merge_tokens(block(x), match_by_energy(mean over heads of the keys, size, r, margin), size)

A token's energy is the sum over all others of elu(cosine - margin); the 2 r of most energy are dealt into two halves, each of the first joins
its nearest in the second, and all other tokens are left out of it. The margin is 0.9 - 0.9 l / L in layer l of L, as deeper tokens are more
alike. Lossy; exact where the merged tokens are equal. The knob is the share of the tokens that the model begins with that go in this layer, so
that it suits any length; the paper's keep ratio of 0.9 to 0.95 is 0.1 to 0.05 of the tokens that are left. Costs the cosines of all pairs,
four times those of `tome`.
Source: Tran et al. 2024, arXiv:2405.16148.
"""

from __future__ import annotations

from functools import partial

from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.progressive import SHARES, Step, Technique, count_of_share, offer, shorten

NAME = "pitome"
MARGIN = 0.9  # in the first layer; it falls to 0 behind the last


def emit(step: Step) -> Reducer:
    margin = round(MARGIN * (1 - step.depth), 4)
    match = step.b.match_by_energy(step.metric(), step.size, step.count, step.place.protected, margin)
    return merging(step.b, match, step.size)


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2405.16148", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
