"""Attention as one op, and torch's own form of it.

attention(query: T[B,H,Tq,D], key: T[B,Hk,Tk,D], value: T[B,Hk,Tk,Dv], mask?, key_bias?, lengths?, scale, left, right, sinks, offset, softcap)
-> T[B,H,Tq,Dv]

Hk divides H (grouped heads). A query at i sees the key at j iff  -left <= j - (i + offset) <= right  or  j < sinks  (a side of -1 is unbounded,
so causal is right=0), and the mask lets it. mask: bool (True is seen) or added, broadcast to [B,H,Tq,Tk]; key_bias: T[B,Tk], added to every
row of scores (log sizes of merged tokens, -inf for padding). lengths: i64 or i32 [B or 1, Tq or 1]; only the first lengths[b, i] keys are seen,
none for a number below one (the filled slots of a cache, ragged batches). With softcap c the scaled scores become c * tanh(scores / c) before masks.
A row in which nothing is seen gives zeros.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, output, type_of_argument
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Op, OpTemplate, aten, define

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? key_bias=None, *, "
    "Tensor? lengths=None, float scale, int left=-1, int right=-1, int sinks=0, int offset=0, float softcap=0.0) -> Tensor"
)
COUNTS = ("i64", "i32")  # types of lengths


def band(query: Tensor, queries: Any, keys: Any, left: int, right: int, sinks: int, offset: int) -> Tensor:
    """bool[Tq, Tk]: which keys the position lets each query see."""
    distance = torch.arange(keys, device=query.device) - torch.arange(queries, device=query.device)[:, None] - offset
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if sinks > 0:
        seen = seen | (torch.arange(keys, device=query.device) < sinks)
    return seen & (distance <= right) if right >= 0 else seen


def counted(lengths: Tensor, keys: Any) -> Tensor:
    """bool[B or 1, 1, Tq or 1, Tk]: the first so many keys of each sample and query."""
    return torch.arange(keys, device=lengths.device) < lengths[:, None, :, None]


def joined_mask(
    query: Tensor, keys: Any, mask: Tensor | None, key_bias: Tensor | None, left: int, right: int, sinks: int, offset: int
) -> Tensor | None:
    """All that hides or biases scores as one mask for torch, no larger than it must be; None if every key is seen equally."""
    if left >= 0 or right >= 0:
        seen = band(query, query.shape[-2], keys, left, right, sinks, offset)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, float("-inf"))
    if key_bias is None:
        return mask
    bias = key_bias.to(query.dtype)[:, None, None, :]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask.to(query.dtype) + bias


def with_lengths(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask that also hides what is not seen."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, key_bias: Tensor | None = None, *,
    lengths: Tensor | None = None, scale: float, left: int = -1, right: int = -1, sinks: int = 0, offset: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The op's meaning in torch; see the card of this module."""
    grouped = query.shape[1] != key.shape[1]
    if lengths is not None:
        mask = with_lengths(mask, counted(lengths, key.shape[-2]))
    plainly_causal = mask is None and key_bias is None and left < 0 and right == 0 and offset == 0
    if softcap == 0.0 and plainly_causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    joined = joined_mask(query, key.shape[-2], mask, key_bias, left, right, sinks, offset)
    if softcap == 0.0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=joined, scale=scale, enable_gqa=grouped)
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)) * (scale / softcap))
    if joined is not None:
        scores = scores.masked_fill(~joined, float("-inf")) if joined.dtype == torch.bool else scores + joined
    return torch.nan_to_num(torch.softmax(scores, -1)) @ value


LIBRARY.define(SCHEMA)
LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")


def attention_flops(node: Node) -> Any:
    """2*Tq*Tk*D for the scores and 2*Tq*Tk*Dv for the values, for every query head; what the softmax adds is not counted.

    Keys that a mask, a band or `is_causal` hides are counted, as in torch's own counter: they are computed. local_attention counts its window.
    """
    query, key, result = type_of_argument(node, "query"), type_of_argument(node, "key"), output(node)
    return 2 * prod(result.shape[:-1]) * key.shape[-2] * (query.shape[-1] + result.shape[-1])


def attention_launches(node: Node) -> int:
    """torch counts places and compares them before its own attention reads the mask."""
    return 1 if arguments(node)["lengths"] is None else 3


define(Op(
    name="attention", targets=(torch.ops.paretorch.attention.default,), kind="attention", flops=attention_flops,
    bytes=inputs_and_output, axes="attention", onnx="attention", triton=OpTemplate("attention"),
    source="arXiv:1706.03762", launches=attention_launches,
))  # fmt: skip
define(Op(
    name="scaled_dot_product_attention", targets=(aten("scaled_dot_product_attention.default"),), kind="attention",
    flops=attention_flops, bytes=inputs_and_output, axes="attention", onnx="scaled_dot_product_attention",
))  # fmt: skip
