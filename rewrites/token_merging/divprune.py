"""Keep the tokens that are most unlike each other; the others are dropped.

x = block(x)  ->  x = keep_tokens(block(x), match_by_diversity(mean over heads of the keys, size, r))

The tokens that stay are chosen so that the least distance between two of them is large: one after another, each the farthest from those chosen,
in a fixed number of passes (`paretorch.ir.ops.token_choice`). Their number is fixed, and nothing but the tokens themselves is looked at, so
no attention is needed for it. Lossy: what is dropped takes its multiplicity with it. The paper drops once, by the features that a vision
tower hands to a language model; here any layer may, and the keys tell which tokens are alike, as they do for `tome`.
Source: Alvar et al. 2025, arXiv:2503.02175.
"""

from __future__ import annotations

from functools import partial

from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, dropping
from paretorch.rewrites.token_merging.progressive import SHARES, Step, Technique, count_of_share, offer, shorten

NAME = "divprune"


def emit(step: Step) -> Reducer:
    match = step.b.match_by_diversity(step.metric(), step.size, step.count, step.place.protected)
    return dropping(step.b, match, step.size)


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2503.02175", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
