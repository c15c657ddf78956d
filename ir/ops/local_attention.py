"""Attention to a window and to the first tokens, computed by blocks.

local_attention(query: T[B,H,T,D], key: T[B,Hk,T,D], value: T[B,Hk,T,Dv], key_bias: T[B or 1,T]?, scale, left, right, sinks, block, softcap)
  -> T[B,H,T,Dv], the same as attention with the same left, right and sinks.

Queries are cut into blocks. Each block attends to the `sinks` first keys and to the left + block + right keys around it, which one lookup by constant
places fetches, so scores cost T * (sinks + left + block + right) instead of T * T. Blocks become the heads of one ordinary
attention and grouped heads become more queries of a block, so keys are never repeated; what a place hides is one mask [1, blocks, block, keys].
Needs left >= 0 and right >= 0. In ONNX: Gather, MatMul, Softmax.
Sources: Beltagy et al. 2020, arXiv:2004.05150; Xiao et al. 2024, arXiv:2309.17453.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.costs import inputs_and_output, output, type_of_argument
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, OpTemplate, define

SCHEMA = (
    "local_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias=None, *, float scale, "
    "int left, int right, int sinks=0, int block=64, float softcap=0.0) -> Tensor"
)


def block_places(tokens: Any, left: int, right: int, sinks: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """places: i64[n, K], the keys that each block reads (K = sinks + left + block + right), and seen: bool[n, block, K].

    Sinks stand first; in the window part they are hidden, so that none counts twice. Places outside the sequence are hidden and read a key inside.
    """
    starts = torch.arange(0, tokens, block, device=device)[:, None]
    column = torch.arange(left + block + right, device=device) - left
    window = starts + column
    row = torch.arange(block, device=device)[:, None]
    near = (column >= row - left) & (column <= row + right)
    seen = near & ((window >= sinks) & (window < tokens))[:, None, :]
    places = window.clamp(0, tokens - 1)
    if sinks > 0:
        first = torch.arange(min(sinks, tokens), device=device)
        earlier = first <= (starts + row.view(1, -1))[..., None] + right
        seen = torch.cat([earlier, seen], -1)
        places = torch.cat([first.expand(places.shape[0], -1), places], 1)
    return places, seen


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None, *,
    scale: float, left: int, right: int, sinks: int = 0, block: int = 64, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The op's meaning in torch; see the card of this module."""
    batch, heads, tokens, width = query.shape
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    places, seen = block_places(tokens, left, right, sinks, block, query.device)
    blocks, span = places.shape

    def fetch(x: Tensor) -> Tensor:
        return x.index_select(2, places.reshape(-1)).reshape(batch * kv_heads, blocks, span, x.shape[-1])

    queries = F.pad(query, (0, 0, 0, blocks * block - tokens)).reshape(batch * kv_heads, group, blocks, block, width)
    queries = queries.transpose(1, 2).reshape(batch * kv_heads, blocks, group * block, width)
    mask = seen.repeat(1, group, 1)[None]
    if key_bias is not None:
        bias = key_bias.to(query.dtype).index_select(1, places.reshape(-1)).reshape(-1, 1, blocks, 1, span)
        bias = bias.masked_fill(~mask, float("-inf"))  # T[B or 1, 1, n, rows, K]
        mask = bias.expand(batch, kv_heads, blocks, group * block, span).reshape(batch * kv_heads, blocks, group * block, span)
    mixed = attention(queries, fetch(key), fetch(value), mask, scale=scale, softcap=softcap)
    mixed = mixed.reshape(batch * kv_heads, blocks, group, block, value.shape[-1]).transpose(1, 2)
    return mixed.reshape(batch, heads, blocks * block, value.shape[-1])[:, :, :tokens]


LIBRARY.define(SCHEMA)
LIBRARY.impl("local_attention", local_attention, "CompositeImplicitAutograd")


def local_attention_flops(node: Node) -> Any:
    """As attention, over the keys that a block reads; queries are padded to whole blocks, and there are no more sinks than tokens."""
    query, given = type_of_argument(node, "query"), arguments(node)
    batch, heads, queries, width = query.shape
    block: int = given["block"]
    keys = min(given["sinks"], queries) + given["left"] + block + given["right"]
    return 2 * batch * heads * ((queries + block - 1) // block * block) * keys * (width + output(node).shape[-1])


define(Op(
    name="local_attention", targets=(torch.ops.paretorch.local_attention.default,), kind="attention", flops=local_attention_flops,
    bytes=inputs_and_output, axes="attention", onnx=Missing("exported by its definition: lookups and one attention"),
    triton=OpTemplate("attention"),
    source="arXiv:2004.05150", definition=local_attention,
))  # fmt: skip
