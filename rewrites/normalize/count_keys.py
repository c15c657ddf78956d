"""Masks that count keys, as the numbers themselves: the form for a kernel that can leave out the keys behind them.

attention(..., mask = (arange(Tk) < n[b, i]) & rest)   ->   attention(..., mask = rest, lengths = n)

Exact: a query sees a key under the same condition. Taken for a runtime whose kernel reads lengths, not for all: rules that ask which tokens are
hidden read masks, and other runtimes would make the mask again. Such masks stand in captured models wherever slots of a static cache are filled
up to a position, or samples are padded to one length: j <= position, j < lengths[b], not(j >= lengths[b]), in any views and orders, joined by
"and" with others. A cache of the last tokens needs nothing else: transformers' StaticSlidingWindowLayer rolls its slots once it is full, so that
its mask counts slots before and hides none after; a ring that is written around hides by the age of a slot, which is a mask of one truth per key
where fewer than all slots are seen, and a count where j < min(written, slots).
Source: the static caches of transformers 5 (`StaticLayer.update`, `masking_utils`); NVIDIA FasterTransformer's `sequence_lengths`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.attention import COUNTS
from paretorch.rewrites.normalize.attention_emit import Emitter
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, aligned, is_tensor, leaves, spelled, trace
from paretorch.rewrites.normalize.masks import Conditions, Given, Part
from paretorch.rewrites.normalize.masks_index import Affine, affine
from paretorch.rewrites.normalize.masks_known import Known
from paretorch.rewrites.normalize.masks_write import condition, joined

LARGEST_COUNT = 1 << 29  # beyond which a number of keys is as good as all; the sum of two of them still fits into i32


@dataclass(frozen=True)
class Count:
    """The first  node + plus  keys are seen; dims: of the node."""

    node: Node
    dims: Dims
    plus: int


@dataclass(frozen=True)
class Masked:
    """An attention whose mask counts. dims: its scores' batch, heads, queries and keys."""

    node: Node
    dims: Dims
    counts: Sequence[Count]
    rest: Sequence[Part]


def count_keys(graph: Graph) -> Graph:
    """The graph with lengths where masks count keys; the same object where none does."""
    if not _found(graph):
        return graph
    graph = graph.copy()
    emitter = Emitter(graph)
    for masked in _found(graph):
        emitter.at(masked.node, origin_of(masked.node))
        graph.replace(masked.node, _written(emitter, masked))
    return graph.clean()


def _found(graph: Graph) -> list[Masked]:
    conditions = Conditions(Known(graph))
    return [found for node in graph.calls if is_op(node, "attention") and (found := _masked(conditions, node)) is not None]


def _masked(conditions: Conditions, node: Node) -> Masked | None:
    given = arguments(node)
    query, key, mask = given["query"], given["key"], given["mask"]
    if mask is None or tensor_type(mask).dtype != "bool" or given["lengths"] is not None:
        return None
    scores = (*shape_of(query)[:3], shape_of(key)[2])
    dims: Dims = [(Axis(size),) for size in scores]
    parts = conditions.parts(mask, aligned(dims, shape_of(mask), scores), False)
    dims = [leaves(dim) for dim in dims]
    counts = {place: count for place, part in enumerate(parts) if (count := _count(conditions.known, part, dims)) is not None}
    rest = [part for place, part in enumerate(parts) if place not in counts]
    return Masked(node, dims, list(counts.values()), rest) if counts else None


def _count(known: Known, part: Part, dims: Dims) -> Count | None:
    """What the condition says if it is  key + number < limit, with a limit for each sample or query."""
    name = spelled(part.node) if isinstance(part, Given) else ""
    if not isinstance(part, Given) or name not in ("lt", "le", "gt", "ge"):
        return None
    if part.hidden:
        name = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}[name]
    small, large = part.node.args[:2] if name in ("lt", "le") else part.node.args[1::-1]
    if not is_tensor(large) or tensor_type(large).dtype not in COUNTS:  # type: ignore[arg-type]
        return None
    index = affine(known, small, _dims_of(small, part))
    if index is None or index != Affine(((dims[3], 1),), index.constant) or not isinstance(index.constant, int):
        return None
    limit = trace(large, _dims_of(large, part))  # type: ignore[arg-type]
    rows = {axis for dim in (dims[0], dims[2]) for axis in leaves(dim)}
    if {axis for axis in limit.axes if axis.size != 1} - rows or abs(index.constant) > LARGEST_COUNT:
        return None
    return Count(limit.node, limit.dims, int(name in ("le", "ge")) - index.constant)


def _dims_of(operand: Any, part: Given) -> Dims:
    return aligned(part.dims, shape_of(operand), shape_of(part.node)) if is_tensor(operand) else []


def _written(emitter: Emitter, masked: Masked) -> Node:
    """The attention with the same operands, the numbers, and what is left of its mask."""
    given = arguments(masked.node)
    batch, _, queries, _ = masked.dims
    lengths = None
    for count in masked.counts:
        one = _number(emitter, count, [batch, queries])
        lengths = one if lengths is None else emitter.emit(aten("minimum.default"), lengths, one)
    rest = joined(emitter, [condition(emitter, part, masked.dims) for part in masked.rest])
    operands = [given[name] for name in ("query", "key", "value")]
    options = {name: value for name, value in masked.node.kwargs.items() if name not in ("mask", "key_bias", "lengths")}
    target = torch.ops.paretorch.attention.default
    return emitter.emit(target, *operands, rest, given["key_bias"], lengths=lengths, **options)


def _number(emitter: Emitter, count: Count, rows: Sequence[Dim]) -> Node:
    """i64 or i32 [B or 1, Tq or 1]. A number is clamped before another is added, so that the largest one of its type stays large."""
    node = emitter.arrange(count.node, count.dims, rows, full=False)
    if count.plus == 0:
        return node
    return emitter.emit(aten("add.Tensor"), emitter.emit(aten("clamp.default"), node, -LARGEST_COUNT, LARGEST_COUNT), count.plus)
