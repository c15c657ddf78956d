"""Merge the r most alike pairs of tokens after an attention block, for all that follows.

x = block(x)  ->  x, size = merge_tokens(block(x), match_tokens(mean over heads of the keys, size, r), size)

and every later attention adds log(size) to the scores of its keys. Lossy; exact where the merged tokens are equal. At r tokens a layer,
layer l works on T - l * r tokens. Merging stands between attention and feed-forward, after the block where one sum holds both. Tokens that
are read by place stay; padding masks become size 0; r is cut to half of the tokens that may merge. What needs every token in its place (dense
outputs, grids, positions) gets them back by the composed map, just before it.
Source: Bolya et al. 2023, arXiv:2210.09461.
"""

from __future__ import annotations

from functools import partial

from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.progressive import Step, Technique, offer, shorten

NAME = "tome"
VALUES: tuple[int, ...] = (
    *(0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096),  # at most half of what a kernel matches
)


def emit(step: Step) -> Reducer:
    match = step.b.match_tokens(step.metric(), step.size, step.count, step.place.protected)
    return merging(step.b, match, step.size)


TECHNIQUE = Technique(NAME, (VALUES,), lambda knob, _: int(knob or 0), emit)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="r", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2210.09461", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
