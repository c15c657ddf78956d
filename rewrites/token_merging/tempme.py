"""Join neighbouring frames of a video that an image encoder reads one by one, and merge what is alike in them.

x[B*F, N, C] = block(x)  ->  x[B*F/g, g*N - r, C], size = merge_tokens(fold_frames(block(x), g), match_tokens(fold_frames(mean over heads of
the keys, g), size, r), size)

Frames that were rows of the batch become tokens of one row, g at a time, so later layers run on fewer rows of more tokens, r of them merged, and see
all frames of a clip. The tokens are dealt place by place, so each may join the one at its own place in a neighbouring frame. Legal where dataflow
shows that the batch is samples x frames and that something behind joins the frames of a sample (`paretorch.rewrites.token_merging.clips`).
The mean over tokens and frames is the size-weighted one over the rows of all clips; where other maps than linear ones stand between the mean over
tokens and that over frames, they act on clips. Leading tokens of each frame, such as class tokens, never merge and are read back from their rows;
what else needs frames gets them back by the composed map. At a further layer the clips fold again: 12 frames by 2, 2 and 3, as the paper has it.

The knob is the share of a clip's tokens that go. Lossy also where nothing merges, as frames see each other: exact where the frames of a clip are
equal, since a softmax over copies is that over one of them, and log(size) counts those that merged. The paper trains the encoder (LoRA) to make
use of that and adds a position for each frame; here nothing is trained or added. The quality of trained models: not measured, as no such model is
at hand.
Source: Shen et al. 2024, arXiv:2409.01156.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import aten
from paretorch.ir.types import TensorType
from paretorch.rewrites.example_models import Sizes, layers
from paretorch.rewrites.rule import Lossy, Rule
from paretorch.rewrites.token_merging.carry import Reducer, merging
from paretorch.rewrites.token_merging.place import Place
from paretorch.rewrites.token_merging.progressive import Step, Technique, count_of_share, offer, shorten

NAME = "tempme"
SHARES: tuple[float, ...] = (0.0, 0.04, 0.08, 0.16, 0.24, 0.3, 0.4, 0.5)
END = 2**63 - 1  # a slice to the end, as export writes it


def emit(step: Step) -> Reducer:
    b, fold, protected = step.b, step.place.fold, step.place.protected
    size = _folded_sizes(b, step.size, fold) if step.size is not None else None
    match = b.match_tokens(b.fold_frames(step.metric(), fold), size, step.count, protected * fold)
    merged = merging(b, match, size)

    def front(at: Builder, rows: Node) -> Node:
        return at.unfold_frames(at.slice(rows, 1, 0, protected * fold), fold)

    return Reducer(
        merged.indices,
        lambda at, x: merged.rows(at, at.fold_frames(x, fold, protected)),
        lambda at, weights: merged.weights(at, at.fold_frames(weights, fold)),
        lambda at, rows, places: at.unfold_frames(at.unmerge_tokens(rows, places), fold, protected),
        front,
    )


def _folded_sizes(b: Builder, size: Node, fold: int) -> Node:
    """T[B,T], or T[1,T] for all samples, as T[B/g,T*g] or T[1,T*g]."""
    one, reshape = shape_of(size)[0] == 1, aten("reshape.default")
    rows = b.unsqueeze(size, 2)
    if one:
        return b.call(reshape, (b.call(aten("expand.default"), (rows, [-1, -1, fold])), [1, -1]))
    return b.call(aten("squeeze.dim"), (b.fold_frames(rows, fold), 2))


def largest(place: Place) -> int:
    """Half of what may merge in a clip."""
    return (int(place.axis.atom.size) - place.protected) * place.fold // 2


TECHNIQUE = Technique(NAME, (SHARES,), count_of_share, emit, largest=largest, folds=True)
sites, rewrite = partial(offer, TECHNIQUE), partial(shorten, TECHNIQUE)


def example(batch: int = 2, frames: int = 4, places: int = 5) -> Graph:
    sizes = Sizes(batch * frames, places)

    def video(b: Builder, x: Node) -> Node:
        reshape = torch.ops.aten.reshape.default
        pooled = b.mean(layers(b, b.call(reshape, (x, [batch * frames, places, sizes.width])), sizes), [1])
        return b.mean(b.call(reshape, (pooled, [batch, frames, sizes.width])), [1])

    return build("video", video, x=TensorType("f32", (batch, frames, places, sizes.width)))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="share", values=TECHNIQUE.values), saves=("flops", "bytes", "memory"),
    source="arXiv:2409.01156", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
