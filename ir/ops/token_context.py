"""Tokens chosen by the attention that they receive, and tokens that are in the frame before; both give what `match_tokens` does.

received_weights(query: T[B,H,T,D], key: T[B,Hk,T,D], size?, scale, softcap)
    -> T[B,T], the attention that each token receives, the mean over heads and over all tokens, counted by their sizes
match_to_context(weight: T[B,T], size?, count=r, protected=p, metric: T[B,T,D], contextual=c)
    -> kept: i64[B,T-r], source: i64[B,r], target: i64[B,r]; the tokens of most weight stay as they are, c of the others take in the rest
match_to_frame_before(metric: T[B,T,D], size?, count=r, protected=p, frames=F)
    -> the same; tokens that are like the one at their place in the frame before join it
places_among(kept: i64[B,K], before, after, tokens=T) -> i64[B,before+K+after]
    the places of kept tokens and of all entries around them where T tokens stand between `before` and `after` others

Context: of the T - p free tokens the T - p - r - c of most weight stay alone. Of the r + c others every (r + c) / c-th in order of place is
a target (as many as there are tokens left if those are fewer than c), and each of the rest joins the target whose cosine with it is largest.
Frames: the free tokens are F frames of as many places, frame by frame. The r tokens whose cosine with the token at the same place one frame
before is largest go; each joins the last one at its place that stays, so those of a place that is still become one. The first frame stays.

Ties go to the lowest place everywhere. A token of size 0 is padding: it goes first (not out of the first frame), and none joins it while a real
one can be joined. Cosines and softmax are computed in f32 at least. `received_weights` writes the scores of all pairs, which fused attention
does not: at most once per use, and its price says so.
Source: Yang et al. 2024, arXiv:2412.04467; Yao et al. 2025, arXiv:2504.17343.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, operands, output_twice, type_of_argument, zero
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define
from paretorch.ir.ops.tokens import in_order, log_size, moved, take_rows


def received_weights(query: Tensor, key: Tensor, size: Tensor | None, scale: float, softcap: float = 0.0) -> Tensor:
    """See the card of this module."""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, tokens, _ = query.shape
    rows = query.to(wide).reshape(batch, key.shape[1], -1, key.shape[3])  # the heads of one group beside each other
    scores = (rows @ key.to(wide).transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if size is None:
        return scores.softmax(-1).mean((1, 2))
    share = size.to(wide).expand(batch, -1)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
    paid = (scores + log_size(size).to(wide)[:, None, None, :]).softmax(-1).reshape(batch, heads, tokens, -1).mean(1)
    return (share[:, None, :] @ paid)[:, 0]


def match_to_context(
    weight: Tensor, size: Tensor | None, count: int, protected: int, metric: Tensor, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See the card of this module. Needs 0 < count, 0 < contextual and count + contextual <= T - protected."""
    free = weight[:, protected:]
    tokens, others = free.shape[1], count + contextual
    padding = None if size is None else (size[:, protected:] == 0).expand(free.shape[0], -1)
    order = in_order(free if padding is None else free.masked_fill(padding, -1.0))[:, tokens - others :]
    places = torch.arange(others, device=weight.device)
    steps = torch.arange(contextual, device=weight.device)[None]
    if padding is None:
        rest = torch.sort(order, dim=1)[0]
        every = (steps * others // contextual).expand(free.shape[0], -1)
    else:
        empty = padding.gather(1, order)
        rest = torch.sort(torch.where(empty, order + tokens, order), dim=1)[0]  # what is real first
        rest = torch.where(rest < tokens, rest, rest - tokens)
        every = steps * (~empty).sum(1, keepdim=True).clamp_min(contextual) // contextual
    chosen = (every[:, :, None] == places).sum(1) > 0
    source = rest.gather(1, torch.sort(torch.where(chosen, places + others, places), dim=1)[0][:, :count])
    source, targets = torch.sort(source, dim=1)[0], rest.gather(1, every)
    unit = F.normalize(metric[:, protected:].to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)
    cosine = take_rows(unit, source) @ take_rows(unit, targets).transpose(1, 2)
    if padding is not None:
        cosine = cosine.masked_fill(padding.gather(1, targets)[:, None, :], -torch.inf)
    joined = targets.gather(1, cosine.max(-1)[1])
    return moved(protected + source, protected + joined, weight.shape[1])


def match_to_frame_before(metric: Tensor, size: Tensor | None, count: int, protected: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """See the card of this module. Needs 0 < count <= (F - 1) * P, where F * P = T - protected."""
    unit = F.normalize(metric[:, protected:].to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)
    batch, tokens, width = unit.shape
    places = tokens // frames
    unit = unit.reshape(batch, frames, places, width)
    alike = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    if size is not None:
        padding = (size[:, protected:] == 0).expand(batch, -1).reshape(batch, frames, places)
        alike = alike.masked_fill(padding[:, :-1], -torch.inf).masked_fill(padding[:, 1:], torch.inf)
    strongest = in_order(alike.reshape(batch, -1))[:, :count]
    source = places + torch.sort(strongest, dim=1)[0]
    every = torch.arange(tokens, device=metric.device)
    goes = (source[:, :, None] == every).sum(1) > 0
    last = torch.where(goes, 0, every // places).reshape(batch, frames, places)  # the last frame in which the place stays, so far
    step = 1
    while step < frames:
        last = torch.cat([last[:, :step], torch.maximum(last[:, step:], last[:, :-step])], 1)
        step *= 2
    joined = (last * places + every[:places]).reshape(batch, tokens).gather(1, source)
    return moved(protected + source, protected + joined, metric.shape[1])


def places_among(kept: Tensor, before: int, after: int, tokens: int) -> Tensor:
    """See the card of this module."""
    batch = kept.shape[0]
    first, last = (torch.arange(count, device=kept.device)[None].expand(batch, -1) for count in (before, after))
    return torch.cat([first, kept + before, last + (before + tokens)], 1)


SCHEMAS = {
    "received_weights": "(Tensor query, Tensor key, Tensor? size, float scale, float softcap=0.0) -> Tensor",
    "match_to_context": (
        "(Tensor weight, Tensor? size, SymInt count, int protected, Tensor metric, SymInt contextual) -> (Tensor, Tensor, Tensor)"
    ),
    "match_to_frame_before": "(Tensor metric, Tensor? size, SymInt count, int protected, int frames) -> (Tensor, Tensor, Tensor)",
    "places_among": "(Tensor kept, int before, int after, int tokens) -> Tensor",
}
for _function in (received_weights, match_to_context, match_to_frame_before, places_among):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def _scores(node: Node) -> Any:
    """How many scores there are: one for each head, query and key."""
    query, key = type_of_argument(node, "query"), type_of_argument(node, "key")
    return prod(query.shape[:3]) * key.shape[2]


def received_flops(node: Node) -> Any:
    """2 * D for each score, five for its softmax, one for the mean."""
    return (2 * type_of_argument(node, "key").shape[3] + 6) * _scores(node)


def received_bytes(node: Node) -> Any:
    """What goes in and out, and the scores written and read in f32, by the product, the softmax and the mean."""
    return inputs_and_output(node) + 4 * 4 * _scores(node)


def context_flops(node: Node) -> Any:
    """The cosines of those that go with the targets, and a sort of the weights with 16 comparisons each."""
    given, metric = arguments(node), type_of_argument(node, "metric")
    return metric.shape[0] * given["count"] * given["contextual"] * 2 * metric.shape[2] + 16 * operands(node)[0].numel


def frame_flops(node: Node) -> Any:
    """A norm and a product with the token before for each number, and a sort of the cosines with 16 comparisons each."""
    metric = type_of_argument(node, "metric")
    return 5 * metric.numel + 16 * metric.shape[0] * metric.shape[1]


SPELLED_OUT = Missing("exported by its definition: products, sorts and lookups")
define(Op(
    name="received_weights", targets=(torch.ops.paretorch.received_weights.default,), kind="matrix", flops=received_flops,
    bytes=received_bytes, axes="class_weights", onnx=SPELLED_OUT, source="arXiv:2412.04467", definition=received_weights,
))  # fmt: skip
define(Op(
    name="match_to_context", targets=(torch.ops.paretorch.match_to_context.default,), kind="matrix", flops=context_flops,
    bytes=inputs_and_output, axes="match_tokens", onnx=SPELLED_OUT, source="arXiv:2412.04467", definition=match_to_context,
))  # fmt: skip
define(Op(
    name="match_to_frame_before", targets=(torch.ops.paretorch.match_to_frame_before.default,), kind="reduce", flops=frame_flops,
    bytes=inputs_and_output, axes="match_to_places", onnx=SPELLED_OUT, source="arXiv:2504.17343", definition=match_to_frame_before,
))  # fmt: skip
define(Op(
    name="places_among", targets=(torch.ops.paretorch.places_among.default,), kind="gather", flops=zero,
    bytes=output_twice, axes="places_among", onnx=SPELLED_OUT, definition=places_among,
))  # fmt: skip
