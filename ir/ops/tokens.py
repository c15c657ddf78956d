"""Tokens as a value: rows, how many original tokens each row stands for (its size), and which row each token went to.

match_tokens(metric: T[B,T,D], size: T[B,T]?, count=r, protected=p) -> kept: i64[B,T-r], source: i64[B,r], target: i64[B,r]
merge_tokens(x: T[B,T,C], kept, source, target, size?, weight?)     -> merged: T[B,T-r,C], size: T[B,T-r]
merge_to_norm(x: T[B,T,C], kept, source, target, size?)             -> the same, each merged row as long as the longest row in it
keep_tokens(x: T[B,T,C], kept, size?)                               -> rows: T[B,T-r,C], size: T[B,T-r]; the sources are dropped
source_map(kept, source, target, previous: i64[B,T0]?)              -> i64[B,T0], the row that each original token is now part of
log_size(size: T[B,T])                                              -> T[B,T], the key bias of tokens of these sizes
weigh_tokens(x, size: T[B,T], token_dim, batch_dims, normalize)     -> x times its tokens' sizes, for sums and means over tokens

Bipartite soft matching: the tokens after the first p are dealt alternately into two halves, each token of the first half (places p, p+2, …)
has as partner the token of the second half whose metric has the largest cosine with its own, and the r with the largest cosine join their
partners. Ties go to the lowest place, both for the partner and for who is among the r. Remaining tokens keep their order, so the first p
keep their places. A size of 0 is padding: it is never a partner while a real token is left, has no weight in any average, and is the first to be
merged away. A size of None is one each, one of T[1,T] is the same for all samples. Cosines are computed in f32 at least.

Rows are fetched by an embedding lookup in x viewed as [B*T, C], and the r merged rows are added by a one-hot product over those r only. At
f32[4,197,384], r=13, one thread: lookup 36 us, index_select 67 us, gather with an expanded index 544 us, a one-hot product over all rows
1558 us; the one-hot product over the r rows 130 us against 82 us for index_add, which has no fixed order where several join one row.
In ONNX these are Gather and MatMul.
Source: Bolya et al. 2023, arXiv:2210.09461.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.ops.costs import inputs_and_output, operands, output, output_twice, per_element, zero
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, OpTemplate, define, is_op, op_of

HIDDEN = -1e30  # the bias of a token of size 0: no weight beside any real token, and a row of nothing but padding stays finite


def match_tokens(metric: Tensor, size: Tensor | None, count: Any, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """kept: i64[B,T-r], source and target: i64[B,r]; see the card of this module. Needs 0 < count <= (T - protected) // 2."""
    best, partner = best_partners(metric, size, protected)
    strongest = in_order(best)[:, :count]
    chosen = torch.sort(strongest, dim=1)[0]
    source = protected + 2 * chosen
    joined = protected + 1 + 2 * partner.gather(1, chosen)
    return moved(source, joined, metric.shape[1])


def best_partners(metric: Tensor, size: Tensor | None, protected: int) -> tuple[Tensor, Tensor]:
    """For each token of the first half the largest cosine with one of the second, infinite for padding, and which of the second that is."""
    unit = F.normalize(metric[:, protected:].to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)
    cosine = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    if size is not None:
        cosine = cosine.masked_fill((size[:, protected + 1 :: 2] == 0)[:, None, :], -torch.inf)
    best, partner = cosine.max(-1)
    return best if size is None else best.masked_fill(size[:, protected::2] == 0, torch.inf), partner


def in_order(value: Tensor) -> Tensor:
    """The places along the second dimension of [B,T], largest value first, equal ones by place: torch's plain sort leaves that open above 16."""
    return torch.sort(value, dim=1, descending=True, stable=True)[1]


def moved(source: Tensor, joined: Tensor, tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a match gives: source: i64[B,r], the places of the tokens that go, ascending; joined: i64[B,r], the place that each goes to."""
    target = joined - (source[:, None, :] < joined[:, :, None]).sum(-1)
    # The j-th row that stays is token j plus the number of sources before it; the i-th source lies before it if source - i <= j.
    count = source.shape[1]
    gone = source - torch.arange(count, device=source.device)
    rows = torch.arange(tokens - count, device=source.device)
    kept = rows + (gone[:, None, :] <= rows[:, None]).sum(-1)
    return kept, source, target


def take_rows(x: Tensor, places: Tensor) -> Tensor:
    """x: T[B,T,C], places: i64[B,K] -> T[B,K,C]."""
    batch, tokens, width = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * tokens
    return F.embedding(places + first, x.reshape(batch * tokens, width))


def merge_tokens(
    x: Tensor, kept: Tensor, source: Tensor, target: Tensor, size: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The average of the tokens of each row, weighted by weight[B,T] or else by size, and the rows' new sizes.

    A row that nothing joins is unchanged to the bit.
    """
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    size = size.expand(x.shape[0], -1)
    joins = target[:, None, :] == torch.arange(kept.shape[1], device=x.device)[:, None]  # bool[B,T-r,r]
    kept_size, source_size = size.gather(1, kept), size.gather(1, source)
    new_size = total = kept_size + (joins * source_size[:, None, :]).sum(-1)
    if weight is not None:
        kept_size, source_size = weight.gather(1, kept), weight.gather(1, source)
        total = kept_size + (joins * source_size[:, None, :]).sum(-1)
    kept_share = torch.where(total > 0, kept_size / total, 1.0)
    source_share = torch.where(source_size > 0, source_size / total.gather(1, target), 0.0)
    joining = take_rows(x, source) * source_share.to(x.dtype)[..., None]
    merged = take_rows(x, kept) * kept_share.to(x.dtype)[..., None]
    return torch.baddbmm(merged, joins.to(x.dtype), joining), new_size


def merge_to_norm(x: Tensor, kept: Tensor, source: Tensor, target: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As merge_tokens, with each row that something joins brought to the length of the longest of its tokens."""
    merged, new_size = merge_tokens(x, kept, source, target, size)
    wide = torch.promote_types(x.dtype, torch.float32)
    length, now = (torch.linalg.vector_norm(rows.to(wide), dim=-1) for rows in (x, merged))
    if size is not None:
        length = length.masked_fill(size == 0, 0.0)
    joins = target[:, None, :] == torch.arange(kept.shape[1], device=x.device)[:, None]
    longest = torch.maximum(length.gather(1, kept), (joins * length.gather(1, source)[:, None, :]).amax(-1))
    scale = torch.where((joins.sum(-1) > 0) & (longest > 0) & (now > 0), longest / now, 1.0)
    return merged * scale.to(x.dtype)[..., None], new_size


def keep_tokens(x: Tensor, kept: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows at the places kept: i64[B,K], and their sizes."""
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return take_rows(x, kept), size.expand(x.shape[0], -1).gather(1, kept)


def source_map(kept: Tensor, source: Tensor, target: Tensor, previous: Tensor | None = None) -> Tensor:
    """For each token the row that it is part of after a match; after an earlier map, for each token that the earlier one began with."""
    rows = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    _, order = torch.sort(torch.cat([kept, source], 1), dim=1)  # a permutation: every token is kept or a source
    merged = torch.cat([rows, target], 1).gather(1, order)
    return merged if previous is None else merged.gather(1, previous)


def log_size(size: Tensor) -> Tensor:
    """What size tokens in one add to the scores of their key: log(size), HIDDEN for none."""
    return torch.log(size).clamp_min(HIDDEN)


def weigh_tokens(x: Tensor, size: Tensor, token_dim: int, batch_dims: Sequence[int], normalize: bool) -> Tensor:
    """x times size[B,T] along token_dim, where B is the product of batch_dims in order; normalize: times size over its mean instead.

    So mean(weigh_tokens(x, normalize=True)) is sum(size * x) / sum(size), and sum(weigh_tokens(x)) is sum(size * x).
    """
    if normalize:
        size = size / size.mean(1, keepdim=True).clamp_min(1e-30)
    dims = [*batch_dims, token_dim]
    weight = size.to(x.dtype).reshape([x.shape[dim] for dim in dims])
    weight = weight.permute(sorted(range(len(dims)), key=lambda place: dims[place]))
    for dim in range(x.dim()):
        weight = weight if dim in dims else weight.unsqueeze(dim)
    return x * weight


def is_match(node: Node | None) -> bool:
    """Whether a node chooses which tokens go and where: it begins the axis of those that are kept, or of those that a map leads to."""
    op = op_of(node) if node is not None else None
    return op is not None and op.axes in ("match_tokens", "match_above", "match_to_places", "assign_tokens")


def is_reduction(node: Node) -> bool:
    """Whether a node makes rows fewer by a match."""
    op = op_of(node)
    return op is not None and op.axes in ("merge_tokens", "merge_by_map")


def match_of(kept: Any) -> Node | None:
    """The match of which this is the first item, or the map; None if it came about otherwise."""
    match = kept.args[0] if isinstance(kept, Node) and kept.target is operator.getitem else kept
    return match if isinstance(match, Node) and is_match(match) else None


def matched(reduction: Node) -> Node:
    """What the match looked at by which rows are made fewer: [B,T,D] or [B,T]."""
    match = match_of(reduction.args[1])
    assert match is not None  # rules make reductions by matches only
    return match.args[0]  # type: ignore[return-value]


def lowered_by(mixer: Node) -> tuple[Node, ...]:
    """The reductions, in order, by which the results of an attention, as rows, are brought down to merged ones; none if they are not."""
    found: list[Node] = []
    todo = [mixer]
    while todo:
        current = todo.pop()
        reduction = next((user for user in current.users if is_reduction(user) and user.args[0] is current), None)
        if reduction is not None:
            found.append(reduction)
            todo = [user for user in reduction.users if user.args[1] == 0]
        else:
            todo += [user for user in current.users if is_op(user, "view", "permute", "transpose", "clone")]
    return tuple(found)


SCHEMAS = {
    "match_tokens": "(Tensor metric, Tensor? size, SymInt count, int protected) -> (Tensor, Tensor, Tensor)",
    "merge_tokens": "(Tensor x, Tensor kept, Tensor source, Tensor target, Tensor? size=None, Tensor? weight=None) -> (Tensor, Tensor)",
    "merge_to_norm": "(Tensor x, Tensor kept, Tensor source, Tensor target, Tensor? size=None) -> (Tensor, Tensor)",
    "keep_tokens": "(Tensor x, Tensor kept, Tensor? size=None) -> (Tensor, Tensor)",
    "source_map": "(Tensor kept, Tensor source, Tensor target, Tensor? previous=None) -> Tensor",
    "log_size": "(Tensor size) -> Tensor",
    "weigh_tokens": "(Tensor x, Tensor size, int token_dim, int[] batch_dims, bool normalize) -> Tensor",
}
for _function in (match_tokens, merge_tokens, merge_to_norm, keep_tokens, source_map, log_size, weigh_tokens):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def match_flops(node: Node) -> Any:
    """The cosines: 2 * D for each of about (T - p)^2 / 4 pairs."""
    batch, tokens, width = operands(node)[0].shape
    protected: Any = node.args[3]
    free: Any = tokens - protected
    return 2 * batch * (free - free // 2) * (free // 2) * width


def merge_flops(node: Node) -> Any:
    """One product per element of the result, and 2 * r for each of them in the one-hot product."""
    return (1 + 2 * operands(node)[2].shape[1]) * output(node).numel


def norm_flops(node: Node) -> Any:
    """A merge, two operations for each element of both lengths, and one to scale it."""
    return merge_flops(node) + 2 * operands(node)[0].numel + 3 * output(node).numel


SPELLED_OUT = Missing("exported by its definition: lookups and products")
SOURCE = "arXiv:2210.09461"
define(Op(
    name="match_tokens", targets=(torch.ops.paretorch.match_tokens.default,), kind="matrix", flops=match_flops,
    bytes=inputs_and_output, axes="match_tokens", onnx=SPELLED_OUT, triton=OpTemplate("match_tokens"),
    source=SOURCE, definition=match_tokens,
))  # fmt: skip
define(Op(
    name="merge_tokens", targets=(torch.ops.paretorch.merge_tokens.default,), kind="gather", flops=merge_flops,
    bytes=inputs_and_output, axes="merge_tokens", onnx=SPELLED_OUT, source=SOURCE, definition=merge_tokens,
))  # fmt: skip
define(Op(
    name="merge_to_norm", targets=(torch.ops.paretorch.merge_to_norm.default,), kind="gather", flops=norm_flops,
    bytes=inputs_and_output, axes="merge_tokens", onnx=SPELLED_OUT, source="arXiv:2312.01026", definition=merge_to_norm,
))  # fmt: skip
define(Op(
    name="keep_tokens", targets=(torch.ops.paretorch.keep_tokens.default,), kind="gather", flops=zero,
    bytes=output_twice, axes="merge_tokens", onnx=SPELLED_OUT, definition=keep_tokens,
))  # fmt: skip
define(Op(
    name="source_map", targets=(torch.ops.paretorch.source_map.default,), kind="gather", flops=zero,
    bytes=output_twice, axes="source_map", onnx=SPELLED_OUT, definition=source_map,
))  # fmt: skip
define(Op(
    name="log_size", targets=(torch.ops.paretorch.log_size.default,), kind="elementwise", flops=per_element(2),
    bytes=inputs_and_output, axes="pointwise", onnx=SPELLED_OUT,
))  # fmt: skip
define(Op(
    name="weigh_tokens", targets=(torch.ops.paretorch.weigh_tokens.default,), kind="elementwise", flops=per_element(1),
    bytes=inputs_and_output, axes="weigh_tokens", onnx=SPELLED_OUT,
))  # fmt: skip
