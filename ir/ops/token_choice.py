"""Other ways than bipartite matching to choose which tokens go. All take and give what `match_tokens` does (see `paretorch.ir.ops.tokens`).

match_by_energy(metric: T[B,T,D], size?, count=r, protected=p, margin)  -> kept: i64[B,T-r], source: i64[B,r], target: i64[B,r]
match_by_diversity(metric: T[B,T,D], size?, count=r, protected=p)       -> the same; source are the tokens that add least to the variety
match_by_weight(weight: T[B,T], size?, count=r, protected=p)            -> the same; the r + 1 tokens of least weight become one
class_weights(query: T[B,H,T,D], key: T[B,Hk,T,D], size?, places, scale, softcap)
    -> T[B,T], the attention that the tokens at these places pay to each, the mean over places and heads: their rows alone are computed

Energy: that of a token is the sum over the others of elu(cosine - margin); the 2 r tokens of most energy, those with many like them, are
dealt alternately into two halves in its order, and each of the first half joins the token of the second whose cosine is largest.
Diversity: tokens are taken one after another, each the farthest from its nearest among those taken (the distance is 1 - cosine; the first
is the one whose nearest other is farthest). Taken singly that needs one pass for each token that stays. Here there are at most ROUNDS
passes, which grow in proportion to what is taken: a pass looks at SEEN times as many tokens as it takes, the farthest, counts each one's
distance to those before it among them, and takes the farthest of them. Up to ROUNDS tokens that is the sequence itself; the work stays T * T * D.
A token that goes has as target the nearest one that stays.

Ties go to the lowest place everywhere. A token of size 0 is padding: it goes first, and none joins it while a real one can be joined.
Cosines and softmax are computed in f32 at least.
Source: Tran et al. 2024, arXiv:2405.16148; Alvar et al. 2025, arXiv:2503.02175; Liang et al. 2022, arXiv:2202.07800.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, operands, type_of_argument
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define
from paretorch.ir.ops.tokens import in_order, log_size, moved, take_rows

ROUNDS = 16
SEEN = 4
PADDING, TAKEN = -1.0, -2.0  # distances below all real ones


def _unit(metric: Tensor, protected: int) -> Tensor:
    return F.normalize(metric[:, protected:].to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)


def match_by_energy(metric: Tensor, size: Tensor | None, count: int, protected: int, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """See the card of this module. Needs 0 < count <= (T - protected) // 2."""
    unit = _unit(metric, protected)
    padding = None if size is None else size[:, protected:] == 0
    near = F.elu(unit @ unit.transpose(1, 2) - margin)
    energy = (near if padding is None else near.masked_fill(padding[:, None, :], 0.0)).sum(-1)
    if padding is not None:
        energy = energy.masked_fill(padding, torch.inf)
    strongest = in_order(energy)[:, : 2 * count]
    first, second = torch.sort(strongest[:, 0::2], dim=1)[0], torch.sort(strongest[:, 1::2], dim=1)[0]
    cosine = take_rows(unit, first) @ take_rows(unit, second).transpose(1, 2)
    if padding is not None:
        cosine = cosine.masked_fill(padding.expand(first.shape[0], -1).gather(1, second)[:, None, :], -torch.inf)
    joined = second.gather(1, cosine.max(-1)[1])
    return moved(protected + first, protected + joined, metric.shape[1])


def class_weights(query: Tensor, key: Tensor, size: Tensor | None, places: Sequence[int], scale: float, softcap: float = 0.0) -> Tensor:
    """See the card of this module."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = torch.stack([query[:, :, place] for place in places], 2).to(wide)
    rows = rows.reshape(key.shape[0], key.shape[1], -1, key.shape[3])  # the heads of one group beside each other
    scores = (rows @ key.to(wide).transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if size is not None:
        scores = scores + log_size(size).to(wide)[:, None, None, :]
    return scores.softmax(-1).mean((1, 2))


def match_by_weight(weight: Tensor, size: Tensor | None, count: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """See the card of this module; the first of the r + 1 in order of weight is the one that the others join. Needs 0 < count < T - protected."""
    free = weight[:, protected:]
    if size is not None:
        free = free.masked_fill(size[:, protected:] == 0, -1.0)
    order = protected + in_order(free)
    stays = order.shape[1] - count
    source = torch.sort(order[:, stays:], dim=1)[0]
    return moved(source, order[:, stays - 1 : stays].expand(-1, count), weight.shape[1])


def match_by_diversity(metric: Tensor, size: Tensor | None, count: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """See the card of this module. Needs 0 < count < T - protected."""
    unit = _unit(metric, protected)
    tokens = unit.shape[1]
    places = torch.arange(tokens, device=metric.device)
    padding = None if size is None else (size[:, protected:] == 0).expand(unit.shape[0], -1)
    apart = (1 - unit @ unit.transpose(1, 2)).masked_fill(places[:, None] == places, torch.inf)
    if padding is not None:
        apart = apart.masked_fill(padding[:, None, :], torch.inf)
    far = apart.min(-1)[0]
    for number, taken in enumerate(rounds(tokens - count)):
        if padding is not None:
            far = far.masked_fill(padding & (far > PADDING), PADDING)
        chosen = _farthest(unit, far, taken)
        rows = take_rows(unit, chosen)
        nearest = (1 - rows @ unit.transpose(1, 2)).min(1)[0].clamp_min(0.0)
        far = nearest if number == 0 else torch.minimum(far, nearest)
        far = far.masked_fill((chosen[:, :, None] == places).sum(1) > 0, TAKEN)
    stays = far == TAKEN
    source = torch.sort(torch.where(stays, places + tokens, places), dim=1)[0][:, :count]
    cosine = take_rows(unit, source) @ unit.transpose(1, 2)
    if padding is not None:
        cosine = cosine.masked_fill(padding[:, None, :], -2.0)
    joined = cosine.masked_fill(~stays[:, None, :], -3.0).max(-1)[1]
    return moved(protected + source, protected + joined, metric.shape[1])


def rounds(tokens: int) -> list[int]:
    """How many tokens each pass of a diverse choice takes: one each as long as that is enough, then ever more."""
    until = [min(tokens, max(place + 1, ceil(tokens ** (place / (ROUNDS - 1)) - 1e-9))) for place in range(ROUNDS)]
    taken = [until[0], *(after - before for before, after in pairwise(until))]
    return [count for count in taken if count > 0]


def _farthest(unit: Tensor, far: Tensor, count: int) -> Tensor:
    """i64[B,count]: the tokens of the largest distance, each counted as near as those before it that are looked at with it."""
    order = in_order(far)
    if count == 1:
        return order[:, :1]
    seen = order[:, : min(SEEN * count, order.shape[1])]
    rows, own = take_rows(unit, seen), far.gather(1, seen)
    places = torch.arange(seen.shape[1], device=far.device)
    between = (1 - rows @ rows.transpose(1, 2)).masked_fill(places >= places[:, None], torch.inf).min(-1)[0].clamp_min(0.0)
    least = torch.where(own < 0, own, torch.minimum(own, between))
    return seen.gather(1, in_order(least)[:, :count])


SCHEMAS = {
    "match_by_energy": "(Tensor metric, Tensor? size, SymInt count, int protected, float margin) -> (Tensor, Tensor, Tensor)",
    "match_by_weight": "(Tensor weight, Tensor? size, SymInt count, int protected) -> (Tensor, Tensor, Tensor)",
    "match_by_diversity": "(Tensor metric, Tensor? size, int count, int protected) -> (Tensor, Tensor, Tensor)",
    "class_weights": "(Tensor query, Tensor key, Tensor? size, int[] places, float scale, float softcap=0.0) -> Tensor",
}
for _function in (match_by_energy, match_by_weight, match_by_diversity, class_weights):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def _free(node: Node) -> tuple[Any, Any, Any, Any]:
    """B, the number of tokens that may go, D, r of a match."""
    given, (batch, tokens, width) = arguments(node), operands(node)[0].shape
    return batch, tokens - given["protected"], width, given["count"]


def energy_flops(node: Node) -> Any:
    """The cosines of all pairs, elu and sum of each, and the cosines of r by r."""
    batch, free, width, count = _free(node)
    return batch * (free * free * (2 * width + 4) + 2 * count * count * width)


def energy_bytes(node: Node) -> Any:
    """What goes in and out, and the cosines written and read."""
    batch, free, _, _ = _free(node)
    return inputs_and_output(node) + 2 * 4 * batch * free * free


def diversity_flops(node: Node) -> Any:
    """The cosines of all pairs, of those that stay with all, of those that go with all, and among those looked at in each pass."""
    batch, free, width, count = _free(node)
    looked_at = sum(min(SEEN * taken, int(free)) ** 2 for taken in rounds(int(free - count)))
    return 2 * batch * width * (free * free + (free - count) * free + count * free + looked_at)


def diversity_bytes(node: Node) -> Any:
    """What goes in and out, all those cosines written and read, and the distances in each pass."""
    batch, free, width, count = _free(node)
    passes = rounds(int(free - count))
    return inputs_and_output(node) + diversity_flops(node) // width * 4 + 10 * 4 * batch * free * len(passes)


def class_flops(node: Node) -> Any:
    """2 * D for each score of each row."""
    query, key = type_of_argument(node, "query"), type_of_argument(node, "key")
    return 2 * prod(query.shape[:2]) * len(arguments(node)["places"]) * key.shape[2] * key.shape[3]


def weight_flops(node: Node) -> Any:
    """A comparison for each weight and each level of the sort, of which 16 are assumed."""
    return 16 * operands(node)[0].numel


SPELLED_OUT = Missing("exported by its definition: products, sorts and lookups")
define(Op(
    name="match_by_energy", targets=(torch.ops.paretorch.match_by_energy.default,), kind="matrix", flops=energy_flops,
    bytes=energy_bytes, axes="match_tokens", onnx=SPELLED_OUT, source="arXiv:2405.16148", definition=match_by_energy,
))  # fmt: skip
define(Op(
    name="match_by_diversity", targets=(torch.ops.paretorch.match_by_diversity.default,), kind="matrix", flops=diversity_flops,
    bytes=diversity_bytes, axes="match_tokens", onnx=SPELLED_OUT, source="arXiv:2503.02175", definition=match_by_diversity,
))  # fmt: skip
define(Op(
    name="match_by_weight", targets=(torch.ops.paretorch.match_by_weight.default,), kind="reduce", flops=weight_flops,
    bytes=inputs_and_output, axes="match_tokens", onnx=SPELLED_OUT, source="arXiv:2202.07800", definition=match_by_weight,
))  # fmt: skip
define(Op(
    name="class_weights", targets=(torch.ops.paretorch.class_weights.default,), kind="matrix", flops=class_flops,
    bytes=inputs_and_output, axes="class_weights", onnx=SPELLED_OUT, source="arXiv:2202.07800", definition=class_weights,
))  # fmt: skip
