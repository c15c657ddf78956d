"""Merge tokens of a video into the token at the same place one frame before, where that is most alike.

x[B, F*P, C] = block(x)  ->  x, size = merge_tokens(block(x), match_to_frame_before(mean over heads of the keys, size, r, frames=F), size)

The r tokens most like the one before them go, from all frames but the first; what stands still over several frames becomes one token. Later
attention counts it as all of them, and where every token is needed again each gets the row that it is part of. Legal where the graph shows
frames that are folded into the tokens (`paretorch.rewrites.token_merging.frames`) and all of them are left there. The tokens are compared
with those of the previous frame, not with the last that was kept, so slow change is followed for as long as each step of it is small. The knob is
the share of the tokens that go; the count is fixed, so that every sample of a batch has the same. Lossy; exact where the merged tokens are equal.
The paper drops tokens by a threshold in front of a causal language model; here they are merged inside of an encoder, as dropping would lose
how many there were. The quality of trained models: not measured, as no such model is at hand.
Source: Yao et al. 2025, arXiv:2504.17343 (differential token drop).
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType
from paretorch.rewrites.example_models import Sizes, layers
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.place import Place, named
from paretorch.rewrites.token_merging.progressive import Step, Technique, count_of_share, offer, shorten

NAME = "merge_frames"
SHARES: tuple[float, ...] = (0.0, 0.04, 0.08, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8)


def emit(step: Step) -> Reducer:
    frames = step.place.frames
    assert frames is not None  # refuse asks for them
    match = step.b.match_to_frame_before(step.metric(), step.size, step.count, frames.first, frames.count)
    return merging(step.b, match, step.size)


def refuse(place: Place) -> str | None:
    """A sentence where no frames are known, or tokens inside of them are read by place."""
    size, frames = place.axis.atom.size, place.frames
    if frames is None:
        return f"nothing in the graph tells that the {size} tokens of {named(place.mixer)} are frames of as many places each"
    if place.protected > frames.first:
        inside = f"{place.protected} leading tokens are read by place, and only {frames.first} stand in front of the first frame"
        return f"{inside} of {named(place.mixer)}"
    return None


def largest(place: Place) -> int:
    """All but the first frame, at most what later steps leave."""
    return min(place.room, (place.frames.count - 1) * place.frames.places) if place.frames else 0


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit, refuse, largest)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, frames: int = 4, places: int = 3) -> Graph:
    sizes = Sizes(batch, frames * places)

    def video(b: Builder, x: Node) -> Node:
        joined = b.call(torch.ops.aten.reshape.default, (x, [batch, sizes.tokens, sizes.width]))
        return b.mean(layers(b, joined, sizes), [1])

    return build("video", video, x=TensorType("f32", (batch, frames, places, sizes.width)))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2504.17343", example=example, sites=sites, rewrite=rewrite,
    reads=frozenset({"grid"}), invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
