"""What attention and `linear` leave of einsums of two operands, as `matmul` or `mul` between views: one spelling, which all that knows products knows.

    einsum("bind,bjnd->bnij", x, y)   ->   permute(x, b n i d) @ permute(y, b n d j)
    einsum("bi,bj->bij", x, y)        ->   unsqueeze(x) * unsqueeze(y)

An index that stands twice in one operand or is summed over in one alone stays, as does what would need two unknown lengths in one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import aten
from paretorch.rewrites.normalize.contractions import Letters, einsum_letters, permuted, reshaped


@dataclass(frozen=True)
class _Parts:
    """Indices by who has them: batch: both operands and the result; rows, columns: the result and one operand; summed: both operands alone."""

    batch: Letters
    rows: Letters
    columns: Letters
    summed: Letters
    sizes: dict[Any, Any]


def products(graph: Graph) -> Graph:
    """The same function without einsums of two operands, where they are products."""
    graph = graph.copy()
    for node in graph.calls:
        letters = einsum_letters(node) if node.target is aten("einsum.default") else None
        if letters is not None:
            left, right = arguments(node)["tensors"]
            _to_product(graph, node, left, right, letters)
    return graph.clean()


def _to_product(graph: Graph, node: Node, left: Node, right: Node, letters: Sequence[Letters]) -> None:
    mine, theirs, out = letters
    parts = _parts(left, right, mine, theirs, out)
    if parts is None or left.meta["val"].dtype != right.meta["val"].dtype:
        return
    b = Builder(graph, node, origin=origin_of(node))
    x = permuted(b, left, mine, [*parts.batch, *parts.rows, *parts.summed])
    y = permuted(b, right, theirs, [*parts.batch, *parts.summed, *parts.columns])
    groups = [parts.batch, parts.rows, parts.columns]
    if parts.summed:
        made = _joined(b, x, shape_of(x), parts, parts.rows, parts.summed), _joined(b, y, shape_of(y), parts, parts.summed, parts.columns)
        if None in made:
            return
        value = _apart(b, b.call(aten("matmul.default"), made), parts)
    else:
        for _ in parts.columns:
            x = b.call(aten("unsqueeze.default"), (x, -1))
        for _ in parts.rows:
            y = b.call(aten("unsqueeze.default"), (y, len(parts.batch)))
        value = b.mul(x, y)
    if value is None:
        return
    value = permuted(b, value, [name for group in groups for name in group], out)
    if tensor_type(value) == tensor_type(node):
        graph.replace(node, value)


def _parts(left: Node, right: Node, mine: Letters, theirs: Letters, out: Letters) -> _Parts | None:
    """None if this is no product of two matrices for each place of a batch."""
    if any(len(set(names)) != len(names) for names in (mine, theirs, out)) or (set(mine) ^ set(theirs)) - set(out):
        return None
    ours, others = dict(zip(mine, shape_of(left), strict=True)), dict(zip(theirs, shape_of(right), strict=True))
    both = [name for name in mine if name in theirs]
    summed = [name for name in both if name not in out]
    if any(ours[name] != others[name] for name in both):  # one of them has length one and is spread
        return None
    rows, columns = ([name for name in out if name in some and name not in both] for some in (mine, theirs))
    return _Parts([name for name in out if name in both], rows, columns, summed, ours | others)


def _joined(b: Builder, value: Node, shape: Sequence[Any], parts: _Parts, *pair: Letters) -> Node | None:
    """The value as matrices: its indices behind those of the batch become two, however many of each there are."""
    if all(len(group) == 1 for group in pair):
        return value
    sizes = [*shape[: len(parts.batch)], *(prod(parts.sizes[name] for name in group) for group in pair)]
    return _viewed(b, value, sizes)


def _apart(b: Builder, value: Node, parts: _Parts) -> Node | None:
    """The product with an axis for each index."""
    if len(parts.rows) == len(parts.columns) == 1:
        return value
    return _viewed(b, value, [parts.sizes[name] for name in [*parts.batch, *parts.rows, *parts.columns]])


def _viewed(b: Builder, value: Node, sizes: Sequence[Any]) -> Node | None:
    unknown = sum(not isinstance(size, int) for size in sizes)
    return reshaped(b, value, [size if isinstance(size, int) else -1 for size in sizes]) if unknown < 2 else None
