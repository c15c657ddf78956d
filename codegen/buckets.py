"""Rows of a batch whose number may be raised: what was recorded for eight of them serves six, seven or eight.

rows_of(graph)    -> where these rows stand in the inputs and outputs, or a sentence: no node may mix, count or order them
bucket(5, most)   -> 6, of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: a recording for each, and at most a third of its rows for nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from paretorch.ir.analyze import Use, axis_of, token_axes
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.types import size_of

HARMLESS = ("pointwise", "returns")
BY_PLACE = ("pointwise", "attention")  # axis rules of ops to which places of an axis may matter, but not what stands at others
TAKE_SIZES = ("view", "expand", "repeat", "create")  # axis rules of ops that take sizes in lists, and make nothing else of them
Places = tuple[int | None, ...]


@dataclass(frozen=True)
class Rows:
    """inputs, outputs: for each of them the dimension of the rows, None where it has none; most: rows that a call may have, None for any number."""

    inputs: Places
    outputs: Places
    most: int | None = None

    def count(self, inputs: Sequence[Tensor]) -> int | None:
        """How many rows a call has; None where they cannot be raised: there is none, or they do not lie densely."""
        own = [(x, dim) for x, dim in zip(inputs, self.inputs, strict=True) if dim is not None]
        found = {x.shape[dim] for x, dim in own}
        return found.pop() if len(found) == 1 and 0 not in found and all(x.stride() == _laid(x, x.shape) for x, _ in own) else None

    def raised(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs with as many rows as their bucket has: behind their own the last one again and again, which is as legal as that."""
        found = []
        for x, dim in zip(inputs, self.inputs, strict=True):
            if dim is not None:
                shape = self.shape(x, dim)
                room = torch.empty_strided(shape, _laid(x, shape), dtype=x.dtype, device=x.device)
                room.narrow(dim, 0, x.shape[dim]).copy_(x)
                room.narrow(dim, x.shape[dim], shape[dim] - x.shape[dim]).copy_(x.narrow(dim, -1, 1))
                x = room
            found.append(x)
        return tuple(found)

    def shape(self, x: Tensor, dim: int) -> list[int]:
        """Of an input with as many rows as the bucket has."""
        return [bucket(size, self.most) if axis == dim else size for axis, size in enumerate(x.shape)]

    def form(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Shape, strides, dtype and device of each of the raised inputs."""
        shapes = [x.shape if dim is None else self.shape(x, dim) for x, dim in zip(inputs, self.inputs, strict=True)]
        strides = [x.stride() if dim is None else _laid(x, shape) for x, shape, dim in zip(inputs, shapes, self.inputs, strict=True)]
        return tuple((torch.Size(shape), stride, x.dtype, x.device) for x, shape, stride in zip(inputs, shapes, strides, strict=True))


def bucket(count: int, most: int | None = None) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... that is no less, or the most that there may be."""
    power = 1 << max(count - 1, 0).bit_length()
    found = power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
    return found if most is None else min(found, most)


def _laid(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of this shape whose dimensions lie in the order of x's; those of length one keep x's."""
    strides, step = [0] * x.dim(), 1
    for axis in sorted(range(x.dim()), key=lambda axis: (x.stride(axis), -axis)):
        strides[axis] = x.stride(axis) if shape[axis] == 1 else step
        step *= shape[axis]
    return tuple(strides)


def rows_of(graph: Graph) -> Rows | str:
    """The first varying size of the inputs that is a number of rows which know nothing of each other, or why the last that was looked at is none."""
    sizes = [size for node in graph.inputs for size in _sizes(node)]
    reason = "no size of an input varies"
    for symbol in dict.fromkeys(size for size in sizes if isinstance(size, sympy.Symbol)):
        found = _rows(graph, symbol)
        if isinstance(found, Rows):
            return found
        reason = found
    return reason


def _rows(graph: Graph, symbol: sympy.Symbol) -> Rows | str:
    inputs = _places(graph.inputs, symbol)
    if isinstance(inputs, str):
        return inputs
    maps, family = token_axes(graph).maps, set[int]()
    for node, dim in zip(graph.inputs, inputs, strict=True):
        found = [axis_of(graph, atom) for atom in (maps[node.name][dim] if dim is not None else ()) if atom.number not in family]
        family |= {number for axis in found for number in (axis.atom.number, *axis.family)}
        use = next((use for axis in found for use in axis.uses if not _is_harmless(use, graph, symbol)), None)
        if use is not None:
            return f"{use.node} {use.kind} the {symbol} rows of {node.name}" + (f": {use.reason}" if use.reason else "")
    for node in graph.calls:
        if any(_depends(value, symbol) for value in _numbers(node)):
            return f"{node.name} computes with how many rows there are"
    values = pytree.tree_leaves(graph.output_node.args[0])
    if any(_depends(value, symbol) for value in values if isinstance(value, Node)):
        return f"the number of rows, {symbol}, is an output"
    outputs = _places(values, symbol)
    if isinstance(outputs, str):
        return outputs
    for value, dim in zip(values, outputs, strict=True):
        if dim is not None and not {atom.number for atom in maps.get(value.name, ((),) * (dim + 1))[dim]} & family:
            return f"the {symbol} rows of {value.name} are not known to be those of an input"
    return Rows(inputs, outputs, _most(graph, symbol))


def _is_harmless(use: Use, graph: Graph, symbol: sympy.Symbol) -> bool:
    node = graph.node(use.node)
    op = op_of(node) if node is not None else None
    if use.kind == "positions":
        return op is not None and op.axes in BY_PLACE
    if use.kind == "selects" and is_op(node, "index"):
        return _looks_up_each(node, symbol)
    return use.kind in HARMLESS or (use.kind, use.reason) == ("bakes_length", "")


def _looks_up_each(node: Any, symbol: sympy.Symbol) -> bool:
    """Whether x[0, 1, 2, ...] is looked up along the rows, with other places in other dimensions: a mask, or the last token of each row."""
    x, indices = node.args[:2]
    return all(index is not None and _counts_up(index, symbol) for size, index in zip(_sizes(x), indices, strict=False) if size == symbol)


def _counts_up(index: Any, symbol: sympy.Symbol) -> bool:
    """Whether this is `arange` of the number of rows, under another shape."""
    while is_op(index, "unsqueeze", "view", "expand", "to"):
        index = index.args[0]
    if not is_op(index, "arange") or _sizes(index) != [symbol]:
        return False
    return index.target is torch.ops.aten.arange.default or tuple(index.args[:1] + index.args[2:]) in ((0,), (0, 1))


def _sizes(node: Any) -> list[Any]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return [size_of(size) for size in value.shape] if isinstance(value, Tensor) else []


def _places(nodes: Sequence[Any], symbol: sympy.Symbol) -> Places | str:
    """The dimension of each value that is this long; a sentence if one is longer by it in another way, or in two dimensions."""
    found: list[int | None] = []
    for node in nodes:
        having = [(dim, size) for dim, size in enumerate(_sizes(node)) if symbol in getattr(size, "free_symbols", ())]
        if len(having) > 1 or any(size != symbol for _, size in having):
            return f"{node.name} has sizes {[str(size) for _, size in having]}, not {symbol} rows"
        found.append(having[0][0] if having else None)
    return tuple(found)


def _depends(node: Node, symbol: sympy.Symbol) -> bool:
    """Whether this is a number that is computed from the size."""
    value: Any = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and symbol in sympy.sympify(value.node.expr).free_symbols


def _numbers(node: Node) -> Iterator[Node]:
    """Arguments of a node with tensors as a result, but for sizes of what it makes."""
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta.get("val"))):
        return
    op = op_of(node)
    takes_sizes = op is not None and op.axes in TAKE_SIZES
    if takes_sizes and getattr(node.target, "overloadpacket", None) is torch.ops.aten.arange:
        return
    for value in [*node.args, *node.kwargs.values()]:
        if not (takes_sizes and isinstance(value, (list, tuple))):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node))


def _most(graph: Graph, symbol: sympy.Symbol) -> int | None:
    """The largest value of a size that the graph was captured for."""
    shapes = [node.meta["val"].shape for node in graph.inputs if isinstance(node.meta["val"], Tensor)]
    varying: Any = next(size for shape in shapes for size in shape if isinstance(size, torch.SymInt))
    upper = varying.node.shape_env.var_to_range[symbol].upper
    return int(upper) if upper.is_Integer and upper < 2**31 else None
