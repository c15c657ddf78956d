"""A value of any layout as rows [B, T, width], and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.tokens import is_reduction


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a value are its tokens and, in order, its batch."""

    token: int
    batch: tuple[int, ...]


def layout_of(axes: AxisFacts, node: Node, atom: Atom, batch: Sequence[Atom]) -> Layout | None:
    """The dimension that is this atom and those that make up the batch; None if they are no dimensions of their own."""
    token = axes.dim(node.name, atom)
    if token is None:
        return None
    dims = tuple(
        i for i, atoms in enumerate(axes.maps[node.name]) if i != token and (atoms or i < token) and set(atoms) <= set(batch)
    )  # a dimension of 1 before the tokens counts as batch
    covered = tuple(part for dim in dims for part in axes.maps[node.name][dim])
    return Layout(token, dims) if covered == tuple(batch) else None


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


def restored(b: Builder, rows: Node, value: Node, layout: Layout, fold: int = 1) -> Node:
    """Rows [B, T', the rest] in the layout that the value has, of which so many rows were folded into one."""
    shape = list(shape_of(value))
    if fold > 1 and isinstance(shape[layout.batch[-1]], int):
        shape[layout.batch[-1]] //= fold
    rest = [dim for dim in range(len(shape)) if dim != layout.token and dim not in layout.batch]
    order = [*layout.batch, layout.token, *rest]
    if len(layout.batch) != 1 or len(rest) != 1:
        sizes = [shape_of(rows)[1] if dim == layout.token else shape[dim] for dim in order]
        rows = b.call(aten("reshape.default"), (rows, [size if isinstance(size, int) else -1 for size in sizes]))
    return rows if order == sorted(order) else b.permute(rows, sorted(range(len(order)), key=order.__getitem__))


def number_per_token(axes: AxisFacts, atom: Atom, batch: Sequence[Atom], node: Node) -> Layout | None:
    """The layout of a value that holds one number per token; None for any other."""
    layout = layout_of(axes, node, atom, batch)
    if layout is None:
        return None
    rest = [size for dim, size in enumerate(shape_of(node)) if dim != layout.token and dim not in layout.batch]
    return layout if all(size == 1 for size in rest) else None


def may_weigh(node: Node) -> list[Node]:
    """The operands of a node that are merged along if they are weights per token: the factors of a product, the rows of a step."""
    if is_op(node, "mul"):
        return node.all_input_nodes
    return [node.args[0]] if is_reduction(node) else []  # type: ignore[list-item]


def weight_chain(axes: AxisFacts, atom: Atom, batch: Sequence[Atom], weight: Node) -> list[Node] | None:
    """From a value that is one number per token to this weight, by casts and expansions only; None if it is more than that."""
    if axes.dim(weight.name, atom) is None:
        return None
    chain = [weight]
    while number_per_token(axes, atom, batch, chain[0]) is None:
        source = chain[0].all_input_nodes
        if not is_op(chain[0], "expand", "to", "unsqueeze") or len(source) != 1:
            return None
        chain.insert(0, source[0])
    return chain
