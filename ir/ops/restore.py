"""Tokens brought back after a merge: every original token gets the row that it is part of.

unmerge_tokens(x: T[B,T',C], places: i64[B,T]) -> T[B,T,C], row places[b, t] of x[b] for token t; places: what source_map gives

Where the merged tokens were equal this is the value that they would have had. Rows are fetched as `merge_tokens` fetches them, in ONNX by Gather.
Source: Bolya et al. 2023, arXiv:2303.17604.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paretorch.ir.ops.costs import output_twice, zero
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define
from paretorch.ir.ops.tokens import take_rows


def unmerge_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x: T[B,T',C], places: i64[B,T] -> T[B,T,C]."""
    return take_rows(x, places)


SCHEMAS = {"unmerge_tokens": "(Tensor x, Tensor places) -> Tensor"}
LIBRARY.define("unmerge_tokens" + SCHEMAS["unmerge_tokens"])
LIBRARY.impl("unmerge_tokens", unmerge_tokens, "CompositeImplicitAutograd")

define(Op(
    name="unmerge_tokens", targets=(torch.ops.paretorch.unmerge_tokens.default,), kind="gather", flops=zero,
    bytes=output_twice, axes="unmerge_tokens", onnx=Missing("exported by its definition: lookups"), source="arXiv:2303.17604",
    definition=unmerge_tokens,
))  # fmt: skip
