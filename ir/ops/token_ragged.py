"""Tokens merged in a number of its own for each sample, in rows of one fixed number.

match_above(metric: T[B,T,D], size?, count=r, protected=p, threshold=t)
    -> kept: i64[B,T-r], source: i64[B,S], target: i64[B,S], places: i64[B,T], where S = ceil((T - p) / 2)
merge_ragged(x: T[B,T,C], kept, source, target, size?) -> merged: T[B,T-r,C], size: T[B,T-r]
follow_map(places: i64[B,T], previous: i64[B,T0])      -> i64[B,T0], the row of each token of which an earlier map says that it is part

Pairs are found as `match_tokens` finds them. A token of the first half joins its partner if the cosine is larger than t, or if it is one of those
with the largest for which there is no row otherwise: with a t that no cosine reaches, and without padding, this is `match_tokens`. source lists the
whole first half; the target of a token that stays is T - r, a row that is not there. places says for each token which row it is part of.

Rows are packed: the first p tokens, then the others that stay, in their order, then as much padding as there is room for (the rest is part of the
last row, without weight), then rows that stand for no token. These have size 0, as padding has, and hold some token that went, so that all that
knows sizes leaves them out; the real ones are the first. A token of size 0 is never joined and takes no real one's row. Ties go to the lowest
place. Rows are fetched and added up as in `merge_tokens`, by a one-hot product over S tokens instead of r.
Source: Wang et al. 2025, arXiv:2504.17040.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paretorch.ir.ops.costs import inputs_and_output, output_twice, zero
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define
from paretorch.ir.ops.tokens import best_partners, in_order, match_flops, merge_flops, take_rows


def match_above(metric: Tensor, size: Tensor | None, count: int, protected: int, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the card of this module. Needs 0 < count <= (T - protected) // 2."""
    batch, tokens, _ = metric.shape
    best, partner = best_partners(metric, size, protected)
    empty = torch.zeros_like(partner[:, : (tokens - protected) // 2])
    if size is not None:
        empty = empty + (size[:, protected + 1 :: 2] == 0)
    rank = torch.sort(in_order(best), dim=1)[1]
    goes = (rank < count - empty.sum(1, keepdim=True)) | (best > threshold)
    behind = tokens * _dealt(2 * goes, empty)  # what is padding behind what is real, what goes behind both
    places, none = torch.arange(tokens, device=metric.device), tokens - count
    _, order = torch.sort(torch.cat([places[:protected].expand(batch, -1), places[protected:] + behind], 1), dim=1)
    row = torch.sort(order, dim=1)[1].clamp(max=none - 1)
    joined = row.gather(1, protected + 1 + 2 * partner)
    part_of = _dealt(torch.where(goes, joined, row[:, protected::2]), row[:, protected + 1 :: 2])
    source = places[protected::2].repeat(batch, 1)
    return order[:, :none], source, torch.where(goes, joined, none), torch.cat([row[:, :protected], part_of], 1)


def _dealt(first: Tensor, second: Tensor) -> Tensor:
    """Numbers of the tokens in their order from those of the two halves, i64[B,S] and [B,S] or [B,S-1]."""
    missing = first.shape[1] - second.shape[1]
    return torch.stack([first, F.pad(second, (0, missing))], 2).flatten(1)[:, : 2 * first.shape[1] - missing]


def merge_ragged(x: Tensor, kept: Tensor, source: Tensor, target: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The average of the tokens of each row as their sizes weigh it, and the rows' sizes. A row that nothing joins is unchanged to the bit."""
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    size, rows = size.expand(x.shape[0], -1), torch.arange(kept.shape[1], device=x.device)
    goes, joins = target < kept.shape[1], target[:, None, :] == rows[:, None]
    is_real = rows < x.shape[1] - goes.sum(1, keepdim=True)
    kept_size = torch.where(is_real, size.gather(1, kept), 0.0)
    source_size = torch.where(goes, size.gather(1, source), 0.0)
    total = kept_size + (joins * source_size[:, None, :]).sum(-1)
    kept_share = torch.where(total > 0, kept_size / total, 1.0)
    share = torch.where(source_size > 0, source_size / total.gather(1, target.clamp(max=kept.shape[1] - 1)), 0.0)
    joining, merged = (take_rows(x, places) * part.to(x.dtype)[..., None] for places, part in ((source, share), (kept, kept_share)))
    return torch.baddbmm(merged, joins.to(x.dtype), joining), total


def follow_map(places: Tensor, previous: Tensor) -> Tensor:
    """See the card of this module."""
    return places.gather(1, previous)


SCHEMAS = {
    "match_above": "(Tensor metric, Tensor? size, SymInt count, int protected, float threshold) -> (Tensor, Tensor, Tensor, Tensor)",
    "merge_ragged": "(Tensor x, Tensor kept, Tensor source, Tensor target, Tensor? size=None) -> (Tensor, Tensor)",
    "follow_map": "(Tensor places, Tensor previous) -> Tensor",
}
for _function in (match_above, merge_ragged, follow_map):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")

SPELLED_OUT = Missing("exported by its definition: products, sorts and lookups")
SOURCE = "arXiv:2504.17040"
define(Op(
    name="match_above", targets=(torch.ops.paretorch.match_above.default,), kind="matrix", flops=match_flops,
    bytes=inputs_and_output, axes="match_above", onnx=SPELLED_OUT, source=SOURCE, definition=match_above,
))  # fmt: skip
define(Op(
    name="merge_ragged", targets=(torch.ops.paretorch.merge_ragged.default,), kind="gather", flops=merge_flops,
    bytes=inputs_and_output, axes="merge_tokens", onnx=SPELLED_OUT, source=SOURCE, definition=merge_ragged,
))  # fmt: skip
define(Op(
    name="follow_map", targets=(torch.ops.paretorch.follow_map.default,), kind="gather", flops=zero,
    bytes=output_twice, axes="follow_map", onnx=SPELLED_OUT, source=SOURCE, definition=follow_map,
))  # fmt: skip
