"""Drop the tokens that have a double, or merge them at full length: whichever loses less at that place.

x = block(x)  ->  x = keep_tokens(block(x), match_tokens(keys, size, r))           below zero: r tokens go, their partners stay as they are
              ->  x, size = merge_to_norm(block(x), match_tokens(keys, size, r))   above zero: the mean, as long as the longest of those merged

The average of two tokens is shorter than they are and may be like nothing that the next layers have seen, so where what follows is far from
linear a token is better dropped, and where it is nearly linear better merged; merged tokens get their length back. The paper finds the layer
where dropping ends by how linear the layers are between pairs of inputs. Here both forms are offered at every place, as shares below and above
zero, and the loss of each is measured on the data, which is what linearity stands for. Lossy; merging is exact where the merged tokens are
equal. Who goes, and to whom, is as in `tome`.
Source: Kim et al. 2024, arXiv:2312.01026.
"""

from __future__ import annotations

from functools import partial

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, dropping, merging
from paretorch.rewrites.token_merging.progressive import SHARES, Step, Technique, count_of_share, offer, shorten

NAME = "tofu"
DROPPED: tuple[float, ...] = (0.0, *(-share for share in SHARES[1:]))


def emit(step: Step) -> Reducer:
    match = step.b.match_tokens(step.metric(), step.size, step.count, step.place.protected)
    if float(step.knob or 0) < 0:
        return dropping(step.b, match, step.size)
    merged = merging(step.b, match, step.size)

    def rows(at: Builder, x: Node) -> Node:
        return at.merge_to_norm(x, *merged.indices, step.size)

    return Reducer(merged.indices, rows, merged.weights)


def count(knob: Knob, tokens: int) -> int:
    return count_of_share(abs(float(knob or 0)), tokens)


TECHNIQUE = Technique(NAME, (DROPPED, SHARES), count, emit)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2312.01026", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
