"""Attention to a cache that lies in pages.

paged_attention(query: T[B,H,Tq,D], key: T[P,Hk,S,D], value: T[P,Hk,S,Dv], pages: i64 or i32 [B or 1, n], mask?, key_bias?, lengths?, scale, left,
right, sinks, offset, softcap) -> T[B,H,Tq,Dv]

Key j of sample b lies in slot j % S of page pages[b, j // S]; a page below zero counts from the end. All else is as in attention to Tk = n * S keys.
Source: Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.costs import inputs_and_output, output, type_of_argument
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, OpTemplate, define

SCHEMA = (
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor pages, Tensor? mask=None, Tensor? key_bias=None, *, "
    "Tensor? lengths=None, float scale, int left=-1, int right=-1, int sinks=0, int offset=0, float softcap=0.0) -> Tensor"
)


def gathered(pool: Tensor, pages: Tensor, batch: Any) -> Tensor:
    """T[P,Hk,S,D] -> T[B,Hk,n*S,D]."""
    return pool[pages].transpose(1, 2).flatten(2, 3).expand(batch, -1, -1, -1)


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Tensor, mask: Tensor | None = None, key_bias: Tensor | None = None, *,
    lengths: Tensor | None = None, scale: float, left: int = -1, right: int = -1, sinks: int = 0, offset: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The op's meaning in torch; see the card of this module."""
    key, value = (gathered(pool, pages, query.shape[0]) for pool in (key, value))
    return attention(
        query, key, value, mask, key_bias, lengths=lengths, scale=scale, left=left, right=right, sinks=sinks, offset=offset, softcap=softcap
    )


LIBRARY.define(SCHEMA)
LIBRARY.impl("paged_attention", paged_attention, "CompositeImplicitAutograd")


def keys_of(node: Node) -> Any:
    """Tk of a call."""
    return type_of_argument(node, "pages").shape[1] * type_of_argument(node, "key").shape[2]


def paged_attention_flops(node: Node) -> Any:
    """As attention to all keys of the table."""
    result = output(node)
    return 2 * prod(result.shape[:-1]) * keys_of(node) * (type_of_argument(node, "query").shape[-1] + result.shape[-1])


def paged_attention_bytes(node: Node) -> Any:
    """Each operand read once, but of the pages those of the table; the output written once."""
    pools = [type_of_argument(node, name) for name in ("key", "value")]
    rows = output(node).shape[0] * keys_of(node)
    read = sum(rows * pool.shape[1] * pool.shape[3] * pool.itemsize - pool.nbytes for pool in pools)
    return inputs_and_output(node) + read


define(Op(
    name="paged_attention", targets=(torch.ops.paretorch.paged_attention.default,), kind="attention", flops=paged_attention_flops,
    bytes=paged_attention_bytes, onnx=Missing("exported by its definition: lookups and one attention"), triton=OpTemplate("attention"),
    source="arXiv:2309.06180", definition=paged_attention,
))  # fmt: skip
