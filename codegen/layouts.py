"""How operands lie in memory: strides as text, and which axes a kernel passes over as one.

A contiguous operand has strides that follow from its sizes. Any other one passes those it was captured with that are not one as arguments, so the
kernel takes any strides at run time; what it took for granted (a stride of one, axes that follow each other) the launcher checks, and copies if not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sympy
from torch.fx import Node

from paretorch.codegen.coordinates import product
from paretorch.ir.graph import shape_of
from paretorch.ir.types import size_of


@dataclass(frozen=True)
class Layout:
    """strides: for each axis a size, or a symbol of the argument's name. known: as captured. parameters: (argument, axis) of those passed."""

    is_contiguous: bool
    strides: tuple[Any, ...]
    known: tuple[Any, ...]
    parameters: tuple[tuple[str, int], ...] = ()

    @property
    def unit_axis(self) -> int | None:
        """The axis whose stride of one is taken for granted; None for a contiguous operand."""
        return None if self.is_contiguous else next((axis for axis, stride in enumerate(self.strides) if stride == 1), None)


def layout_of(node: Node, name: str) -> Layout:
    """The layout that the value was captured with."""
    shape = shape_of(node)
    known = tuple(size_of(stride) for stride in node.meta["val"].stride())
    dense = tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))
    pairs = zip(shape, known, dense, strict=True)
    if all(size == 1 or _same(stride, wanted) for size, stride, wanted in pairs):
        return Layout(True, dense, dense)
    last = max((axis for axis, size in enumerate(shape) if size != 1), default=None)
    unit = last if last is not None and known[last] == 1 else None  # of no other axis would a contiguous copy have a stride of one
    strides = tuple(1 if axis == unit else sympy.Symbol(f"{name}_s{axis}") for axis in range(len(shape)))
    parameters = tuple((f"{name}_s{axis}", axis) for axis in range(len(shape)) if axis != unit and shape[axis] != 1)
    return Layout(False, strides, known, parameters)


def merged_axes(lead: Sequence[Any], shape: Sequence[Any], nodes: Sequence[Node], layouts: Mapping[Node, Layout]) -> set[int]:
    """Axes of the space that can be passed over together with the next one that is longer than one: all values treat both alike."""
    long = [axis for axis, size in enumerate(lead) if size != 1]
    found = set()
    for axis, following in pairwise(long):
        alike = all(_has(node, axis, shape) == _has(node, following, shape) for node in (*layouts, *nodes))
        if alike and all(_runs(node, layout, axis, following, shape) for node, layout in layouts.items()):
            found.add(axis)
    return found


def merged_pairs(layout: Layout, node: Node, merged: set[int], shape: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """The operand's own axes that a kernel passes over together."""
    shift = len(shape) - len(shape_of(node))
    long = [axis for axis, size in enumerate(shape) if size != 1]
    pairs = [(a - shift, b - shift) for a, b in pairwise(long) if a in merged and _has(node, a, shape)]
    return () if layout.is_contiguous else tuple(pairs)


def _has(node: Node, axis: int, shape: Sequence[Any]) -> bool:
    own = shape_of(node)
    place = axis - (len(shape) - len(own))
    return place >= 0 and own[place] != 1


def _runs(node: Node, layout: Layout, axis: int, following: int, shape: Sequence[Any]) -> bool:
    """Whether an element of one axis is a whole pass of the next one away."""
    if not _has(node, axis, shape) or layout.is_contiguous:
        return True
    shift = len(shape) - len(shape_of(node))
    first, second = layout.known[axis - shift], layout.known[following - shift]
    return _same(first, second * shape[following])


def _same(first: Any, second: Any) -> bool:
    return bool(first == second or sympy.expand(first - second) == 0)
