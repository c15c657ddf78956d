"""Clips: neighbouring rows of the batch, such as frames of a video, as one row with the tokens of all of them, and back.

fold_frames(x: T[B*G,N,C], count=G, leading=p)   -> T[B,N*G,C]: the tokens of G rows, place by place: token 0 of each row, token 1 of each row, ...
unfold_frames(x: T[B,N*G,C], count=G, leading=p) -> T[B*G,N,C]: what fold_frames was given

p says how many leading tokens of each of the G rows are read by their places behind it; it changes no value.

Place by place the leading tokens of all rows stay in front, and the tokens of one place stand beside each other, so that the two halves into
which `match_tokens` deals the others alternately both hold some of every place: where rows are equal, each token of the first half has an
equal one in the second. In ONNX these are Reshape and Transpose.
Source: Shen et al. 2024, arXiv:2409.01156.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretorch.ir.ops.costs import output_twice, zero
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define


def fold_frames(x: Tensor, count: int, leading: int = 0) -> Tensor:
    """See the card of this module. Needs a batch that is a multiple of count."""
    _, tokens, width = x.shape
    return x.reshape(-1, count, tokens, width).transpose(1, 2).reshape(-1, tokens * count, width)


def unfold_frames(x: Tensor, count: int, leading: int = 0) -> Tensor:
    """See the card of this module. Needs a number of tokens that is a multiple of count."""
    _, tokens, width = x.shape
    return x.reshape(-1, tokens // count, count, width).transpose(1, 2).reshape(-1, tokens // count, width)


SCHEMAS = {
    "fold_frames": "(Tensor x, int count, int leading=0) -> Tensor",
    "unfold_frames": "(Tensor x, int count, int leading=0) -> Tensor",
}
for _function in (fold_frames, unfold_frames):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")

SPELLED_OUT = Missing("exported by its definition: reshapes and a transpose")
define(Op(
    name="fold_frames", targets=(torch.ops.paretorch.fold_frames.default,), kind="gather", flops=zero, bytes=output_twice,
    axes="fold_frames", onnx=SPELLED_OUT, source="arXiv:2409.01156", definition=fold_frames,
))  # fmt: skip
define(Op(
    name="unfold_frames", targets=(torch.ops.paretorch.unfold_frames.default,), kind="gather", flops=zero, bytes=output_twice,
    axes="unfold_frames", onnx=SPELLED_OUT, source="arXiv:2409.01156", definition=unfold_frames,
))  # fmt: skip
