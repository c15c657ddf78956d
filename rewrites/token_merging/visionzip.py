"""Keep the tokens that receive most attention, and merge the others into a few that stand for their surroundings.

x = block(x)  ->  weight = class_weights(query, key, size)            where a token is read by its place, such as a class token: its row alone
                  weight = received_weights(query, key, size)         elsewhere: the mean of all rows
                  x, size = merge_tokens(block(x), match_to_context(weight, size, r, keys, c), size)

Of K tokens that stay 5 in 32 (at least one) are contextual: places at even steps among the tokens of less weight, to which the rest goes by the
likeness of their keys. The others are dominant and stay as they are. One step at one place, and K is fixed, so any share may go: the shares at
the end of the list are 192, 128 and 64 of 576. Leading tokens that the model cuts off unread (as towers do whose class token is for another
head) count as class tokens. Behind the step later layers of an encoder know the sizes. Where features enter a sequence of other tokens, as in
the prompt of a language model, the prompt becomes shorter: see `paretorch.rewrites.token_merging.prompt`.
Lossy; in an encoder exact where the merged tokens are equal. The paper chooses by the attention of the layer before the last and merges with
equal weights; here any layer may, and sizes weigh the average. The quality of trained models: not measured, as no such model is at hand.
Source: Yang et al. 2024, arXiv:2412.04467.
"""

from __future__ import annotations

from functools import partial

from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Rule, Site
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.place import Place, named
from paretorch.rewrites.token_merging.progressive import Step, Technique, count_of_share, offer, shorten
from paretorch.rewrites.token_merging.prompt import shorten_prompts

NAME = "visionzip"
SHARES: tuple[float, ...] = (0.0, 0.04, 0.08, 0.16, 0.24, 0.32, 0.48, 0.6667, 0.7778, 0.8889)


def emit(step: Step) -> Reducer:
    b, place = step.b, step.place
    left = int(place.axis.atom.size) - place.protected - step.count
    contextual = min(max(1, (step.whole - step.count) * 5 // 32), left)
    match = b.match_to_context(weight_of(step), step.size, step.count, place.protected, step.metric(), contextual)
    return merging(b, match, step.size)


def weight_of(step: Step) -> Node:
    """T[B,T]: the attention that each token receives, of the class token where there is one."""
    place, given = step.place, arguments(step.place.mixer)
    classes = place.read or range(place.protected)
    if classes:
        return step.b.class_weights(given["query"], given["key"], step.size, list(classes), given["scale"], given["softcap"])
    return step.b.received_weights(given["query"], given["key"], step.size, given["scale"], given["softcap"])


def refuse(place: Place) -> str | None:
    """A sentence where the attention that tokens receive could not rank them."""
    given = arguments(place.mixer)
    if place.virtual:
        return f"{named(place.mixer)} runs on all tokens, copies of merged ones among them, so what a merged one receives is not told there"
    pairs = mask_by_pairs(place.mixer)
    if pairs:
        return pairs
    if given["left"] >= 0 or given["right"] >= 0:
        return f"{named(place.mixer)} lets a query see keys by their places, so what a token receives depends on where it stands"
    queries, keys = shape_of(given["query"])[2], shape_of(given["key"])[2]
    return (
        None if queries == keys else f"{named(place.mixer)} has {queries} queries for {keys} keys, so its rows are not those of the tokens"
    )


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit, refuse, lambda place: place.room)
sites = partial(offer, TECHNIQUE)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """The graph with fewer tokens after the site, and shorter prompts where these enter one. Raises PlanError as `shorten` does."""
    shorter = shorten(TECHNIQUE, graph, site, knob)
    return shorter if shorter is graph else shorten_prompts(shorter, NAME, site.name)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2412.04467", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
