"""Fuse the tokens to which the class token pays least attention into one.

x = block(x)  ->  weight = class_weights(query, key, size)                      one row of the attention's softmax, the mean over heads
                  x, size = merge_tokens(block(x), match_by_weight(weight, size, r), size, weight)

The r + 1 tokens of least weight become their average by these weights, whose size is the sum of theirs, so that later attention counts it as
all of them; the others stay as they are. Only the class token's row is computed again from query and key: the attention itself stays fused.
Lossy; exact where the fused tokens are equal. Legal where the model reads a token by its place at the end: that one is the class token; where it
reads several, their mean counts. The paper's keep rate of 0.7 at three places is a share of 0.3. Its published code adds the weighted tokens up;
the average is the same but for the token's length, which the next norm takes out.
Source: Liang et al. 2022, arXiv:2202.07800.
"""

from __future__ import annotations

from functools import partial

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.place import Place, named
from paretorch.rewrites.token_merging.progressive import SHARES, Step, Technique, count_of_share, offer, shorten

NAME = "evit"


def emit(step: Step) -> Reducer:
    b, place, given = step.b, step.place, arguments(step.place.mixer)
    weight = b.class_weights(given["query"], given["key"], step.size, list(place.read), given["scale"], given["softcap"])
    merged = merging(b, b.match_by_weight(weight, step.size, step.count, place.protected), step.size)

    def rows(at: Builder, x: Node) -> Node:
        return at.merge_tokens(x, *merged.indices, step.size, weight)

    return Reducer(merged.indices, rows, merged.weights)


def refuse(place: Place) -> str | None:
    """A sentence where no token's attention could rank the others."""
    given = arguments(place.mixer)
    if place.virtual:
        return f"{named(place.mixer)} runs on all tokens, copies of merged ones among them, so what a merged one receives is not told there"
    pairs = mask_by_pairs(place.mixer)
    if pairs:
        return pairs
    if given["left"] >= 0 or given["right"] >= 0:
        return f"{named(place.mixer)} lets a query see keys by their places, so no token attends to all others"
    if not place.read:
        return f"the model reads no token by its place after {named(place.mixer)}, so there is no class token whose attention could rank the others"
    return None


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit, refuse)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2202.07800", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
