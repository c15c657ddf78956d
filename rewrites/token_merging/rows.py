"""A value of any layout as rows [B, T, width], and back."""

from __future__ import annotations

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import shape_of
from paretorch.ir.ops import aten
from paretorch.rewrites.token_merging.place import Layout


def rows_of(b: Builder, value: Node, layout: Layout) -> Node:
    """A value as [B, T, the rest]."""
    shape = shape_of(value)
    rest = [dim for dim in range(len(shape)) if dim != layout.token and dim not in layout.batch]
    order = [*layout.batch, layout.token, *rest]
    moved = value if order == sorted(order) else b.permute(value, order)
    if len(layout.batch) == 1 and len(rest) == 1:
        return moved
    width = 1
    for dim in rest:
        width *= shape[dim]
    return b.call(aten("reshape.default"), (moved, [-1, shape[layout.token], width]))


def restored(b: Builder, rows: Node, value: Node, layout: Layout) -> Node:
    """Rows [B, T', the rest] in the layout that the value has."""
    shape = shape_of(value)
    rest = [dim for dim in range(len(shape)) if dim != layout.token and dim not in layout.batch]
    order = [*layout.batch, layout.token, *rest]
    if len(layout.batch) != 1 or len(rest) != 1:
        sizes = [shape_of(rows)[1] if dim == layout.token else shape[dim] for dim in order]
        rows = b.call(aten("reshape.default"), (rows, [size if isinstance(size, int) else -1 for size in sizes]))
    return rows if order == sorted(order) else b.permute(rows, sorted(range(len(order)), key=order.__getitem__))
