"""Merging for the length of one sublayer: destinations at fixed places, or a linear map from all tokens to a few.

match_to_places(metric: T[B,T,D], size: T[B,T]?, destinations: i64[K], sources: i64[S], count=r) -> kept, source, target as match_tokens gives
assign_tokens(metric: T[B,T,D], size: T[B,T]?, windows: i64[W,L], count=n, protected=p, temperature) -> map: T[B,p+W*n,T]
merge_by_map(x: T[B,T,C], map, size?)                                                            -> merged: T[B,K,C], size: T[B,K]
unmerge_by_map(x: T[B,K,C], map)                                                                 -> T[B,T,C]

match_to_places: each source has as partner the destination whose metric has the largest cosine with its own, and the r sources with the largest
cosine join their partners; ties go to the first in the lists, and padding (size 0) is treated as match_tokens treats it.

assign_tokens: in each window of tokens, n destinations by facility location, one after the other: the token that adds most to the sum over the
window's tokens of the cosine with their nearest destination (ties to the lowest place; padding weighs nothing and is taken last). Every token
is then shared out among all of them by softmax(cosine / temperature): a column of the map sums to one. The first p tokens are in no window; they are
destinations of their own. A row of windows that ends in repeats of its last token is a window of fewer tokens.
merge_by_map: averages by map and size; unmerge_by_map: the transpose, so that every token gets the mixture of destinations that it went to. Both are
plain matrix products, and exact on equal tokens as the temperature goes to 0.
Sources: Bolya & Hoffman 2023, arXiv:2303.17604 (places); Lu et al. 2025, arXiv:2509.10918 (map).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, operands, output
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.table import Missing, Op, define
from paretorch.ir.ops.tokens import in_order, moved


def _unit(metric: Tensor) -> Tensor:
    return F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1, eps=1e-6)


def match_to_places(
    metric: Tensor, size: Tensor | None, destinations: Tensor, sources: Tensor, count: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """kept: i64[B,T-r], source and target: i64[B,r]; see the card of this module. Needs 0 < count <= S; tokens in neither list stay as they are."""
    unit = _unit(metric)
    cosine = unit.index_select(1, sources) @ unit.index_select(1, destinations).transpose(1, 2)
    if size is not None:
        size = size.expand(metric.shape[0], -1)
        cosine = cosine.masked_fill((size.index_select(1, destinations) == 0)[:, None, :], -torch.inf)
    best, partner = cosine.max(-1)
    if size is not None:
        best = best.masked_fill(size.index_select(1, sources) == 0, torch.inf)
    chosen = torch.sort(in_order(best)[:, :count], dim=1)[0]
    source = sources.expand(metric.shape[0], -1).gather(1, chosen)
    joined = destinations.expand(metric.shape[0], -1).gather(1, partner.gather(1, chosen))
    return moved(source, joined, metric.shape[1])


def assign_tokens(metric: Tensor, size: Tensor | None, windows: Tensor, count: int, protected: int, temperature: float) -> Tensor:
    """T[B,p+W*n,T], columns summing to one; see the card of this module. Needs 0 < count <= the tokens of the shortest window."""
    unit = _unit(metric)
    batch, tokens, width = unit.shape
    chosen = _facilities(unit, size, windows, count)
    places = windows[None].expand(batch, -1, -1).reshape(-1, windows.shape[1]).gather(1, chosen).reshape(batch, -1)
    first = torch.arange(batch, device=metric.device)[:, None] * tokens
    destination = F.embedding(places + first, unit.reshape(-1, width))
    score = destination @ unit[:, protected:].transpose(1, 2) / temperature
    if size is not None:
        hidden = (size.expand(batch, -1) == 0).to(unit.dtype).gather(1, places)
        score = score - hidden[:, :, None] * 1e30
    share = score.softmax(1)
    if not protected:
        return share
    own = torch.eye(protected, dtype=share.dtype, device=share.device)[None].expand(batch, -1, -1)
    return torch.cat([F.pad(own, (0, tokens - protected)), F.pad(share, (protected, 0))], 1)


def _facilities(unit: Tensor, size: Tensor | None, windows: Tensor, count: int) -> Tensor:
    """The places in each window, i64[B*W,n], of the destinations that facility location takes one after the other."""
    (batch, _, width), length = unit.shape, windows.shape[1]
    near = unit.index_select(1, windows.reshape(-1)).reshape(-1, length, width)
    cosine = near @ near.transpose(1, 2)  # [B*W, L, L]
    repeats = torch.cat([windows[:, :1] < 0, windows[:, 1:] == windows[:, :-1]], 1)[None].expand(batch, -1, -1).reshape(-1, length)
    weight = torch.where(repeats, 0.0, 1.0).to(unit.dtype)
    if size is not None:
        weight = weight * size.expand(batch, -1).to(unit.dtype).index_select(1, windows.reshape(-1)).reshape(-1, length)
    taken, covered, chosen = repeats, torch.full_like(weight, -1.0), []
    for _ in range(count):
        gain = ((cosine - covered[:, None, :]).clamp_min(0.0) * weight[:, None, :]).sum(-1)
        gain = torch.where(weight > 0, gain, -1.0).masked_fill(taken, -torch.inf)
        place = gain.argmax(1, keepdim=True)
        picked = torch.arange(length, device=unit.device) == place
        taken = taken | picked
        covered = torch.maximum(covered, torch.where(picked[:, :, None], cosine, -1.0).amax(1))
        chosen.append(place)
    return torch.cat(chosen, 1)


def merge_by_map(x: Tensor, map: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The average of the tokens that went to each destination, weighted by how much of them did and their sizes, and the sum of these weights."""
    weight = map if size is None else map * size.to(map.dtype)[:, None, :]
    total = weight.sum(-1)
    share = weight / total.clamp_min(1e-30)[..., None]
    return share.to(x.dtype) @ x, total


def unmerge_by_map(x: Tensor, map: Tensor) -> Tensor:
    """x: T[B,K,C], map: T[B,K,T] -> T[B,T,C]."""
    return map.to(x.dtype).transpose(1, 2) @ x


SCHEMAS = {
    "match_to_places": "(Tensor metric, Tensor? size, Tensor destinations, Tensor sources, SymInt count) -> (Tensor, Tensor, Tensor)",
    "assign_tokens": "(Tensor metric, Tensor? size, Tensor windows, int count, int protected, float temperature) -> Tensor",
    "merge_by_map": "(Tensor x, Tensor map, Tensor? size=None) -> (Tensor, Tensor)",
    "unmerge_by_map": "(Tensor x, Tensor map) -> Tensor",
}
for _function in (match_to_places, assign_tokens, merge_by_map, unmerge_by_map):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def _numel(node: Node, name: str) -> Any:
    return arguments(node)[name].meta["val"].numel()


def match_flops(node: Node) -> Any:
    """The cosines: 2 * D for each source and destination."""
    batch, _, width = operands(node)[0].shape
    return 2 * batch * _numel(node, "sources") * _numel(node, "destinations") * width


def assign_flops(node: Node) -> Any:
    """The cosines inside of windows and from every token to every destination; four operations for each pair of a window and destination chosen."""
    batch, tokens, width = operands(node)[0].shape
    rows, length = arguments(node)["windows"].meta["val"].shape
    count: Any = arguments(node)["count"]
    pairs = batch * rows * length * length
    return 2 * pairs * width + 4 * pairs * count + 2 * batch * rows * count * tokens * width


def merge_flops(node: Node) -> Any:
    """2 * T for each element of what is merged."""
    return 2 * output(node).numel * operands(node)[0].shape[1]


def unmerge_flops(node: Node) -> Any:
    """2 * K for each element of what comes back."""
    return 2 * output(node).numel * operands(node)[0].shape[1]


SPELLED_OUT = Missing("exported by its definition: lookups and products")
PLACES, MAP = "arXiv:2303.17604", "arXiv:2509.10918"
define(Op(
    name="match_to_places", targets=(torch.ops.paretorch.match_to_places.default,), kind="matrix", flops=match_flops,
    bytes=inputs_and_output, axes="match_to_places", onnx=SPELLED_OUT, source=PLACES, definition=match_to_places,
))  # fmt: skip
define(Op(
    name="assign_tokens", targets=(torch.ops.paretorch.assign_tokens.default,), kind="matrix", flops=assign_flops,
    bytes=inputs_and_output, axes="assign_tokens", onnx=SPELLED_OUT, source=MAP, definition=assign_tokens,
))  # fmt: skip
define(Op(
    name="merge_by_map", targets=(torch.ops.paretorch.merge_by_map.default,), kind="matrix", flops=merge_flops,
    bytes=inputs_and_output, axes="merge_by_map", onnx=SPELLED_OUT, source=MAP, definition=merge_by_map,
))  # fmt: skip
define(Op(
    name="unmerge_by_map", targets=(torch.ops.paretorch.unmerge_by_map.default,), kind="matrix", flops=unmerge_flops,
    bytes=inputs_and_output, axes="unmerge_by_map", onnx=SPELLED_OUT, source=MAP, definition=unmerge_by_map,
))  # fmt: skip
