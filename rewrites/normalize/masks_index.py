"""Positions computed in the graph: values that are an index along one or two axes plus a number, and what comparing them says.

arange(T)[:, None] - window < arange(T)[None, :]   is   -window < column - row:  a strip of a matrix, whatever T is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.ir.types import ScalarType, from_fake
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, aligned, is_tensor, leaves, length, spelled, trace
from paretorch.rewrites.normalize.masks_known import Known

INTEGERS = ("i64", "i32", "i16", "i8", "u8", "bool")


@dataclass(frozen=True)
class Affine:
    """A whole number at each place: the sum of weight * index along each axis, plus a constant (an int or an expression in sizes)."""

    weights: tuple[tuple[Dim, int], ...]
    constant: Any

    def plus(self, other: Affine, sign: int) -> Affine:
        total = dict(self.weights)
        for dim, weight in other.weights:
            total[dim] = total.get(dim, 0) + sign * weight
        kept = tuple((dim, weight) for dim, weight in total.items() if weight != 0)
        return Affine(kept, _plain(self.constant + sign * other.constant))


def _plain(value: Any) -> Any:
    expression = sympy.sympify(value)
    return int(expression) if expression.is_Integer else expression


def scalar_expression(argument: Any) -> Any | None:
    """The whole number that an argument stands for: an int, or an expression if it is a size of the graph."""
    if isinstance(argument, (bool, float)):
        return int(argument) if float(argument).is_integer() else None
    if isinstance(argument, int):
        return argument
    if isinstance(argument, Node) and not is_tensor(argument):
        found = from_fake(argument.meta["val"])
        return found.expression if isinstance(found, ScalarType) and found.kind == "int" else None
    return None


def affine(known: Known, argument: Any, dims: Dims) -> Affine | None:
    """What an integer value is at each place; dims: the axes of its dimensions. None if it is not a sum of indices."""
    number = scalar_expression(argument)
    if number is not None:
        return Affine((), number)
    if not is_tensor(argument) or tensor_type(argument).dtype not in INTEGERS:
        return None
    seen = trace(argument, dims)
    node, dims, name = seen.node, seen.dims, spelled(seen.node)
    constant = known.uniform(node)
    if constant is not None:
        return Affine((), int(constant))
    if name == "arange":
        return _arange(node, dims)
    if name in ("add", "sub", "rsub"):
        return _sum(known, node, dims)
    if name in ("_to_copy", "to", "type_as") and tensor_type(node.args[0]).dtype in INTEGERS:  # type: ignore[arg-type]
        return affine(known, node.args[0], dims)
    reader = _READERS.get(name)
    return reader(known, node, dims) if reader is not None else _constant_index(known, node, dims)


def _arange(node: Node, dims: Dims) -> Affine | None:
    given = arguments(node)
    start, step = scalar_expression(given.get("start", 0)), given.get("step", 1)
    if step != 1 or start is None:
        return None
    return Affine(((leaves(dims[0]), 1),) if length(leaves(dims[0])) != 1 else (), start)


def _sum(known: Known, node: Node, dims: Dims) -> Affine | None:
    if arguments(node).get("alpha", 1) != 1:
        return None
    parts = [affine(known, operand, _operand_dims(operand, node, dims)) for operand in node.args[:2]]
    if parts[0] is None or parts[1] is None:
        return None
    if spelled(node) == "rsub":
        return parts[1].plus(parts[0], -1)
    return parts[0].plus(parts[1], 1 if spelled(node) == "add" else -1)


def _operand_dims(operand: Any, node: Node, dims: Dims) -> Dims:
    return aligned(dims, shape_of(operand), shape_of(node)) if is_tensor(operand) else []


def _slice(known: Known, node: Node, dims: Dims) -> Affine | None:
    """A slice of an index along its own axis is an index that starts later."""
    given = arguments(node)
    start, place = scalar_expression(given["start"] or 0), given["dim"]
    if start is None or (isinstance(start, int) and start < 0) or given["step"] != 1:
        return None
    place = place % len(dims)
    whole: Dim = (Axis(shape_of(given["self"])[place]),)
    source = affine(known, given["self"], [*dims[:place], whole, *dims[place + 1 :]])
    if source is None:
        return None
    step = dict(source.weights).get(leaves(whole), 0)
    rest = tuple(entry for entry in source.weights if entry[0] != leaves(whole))
    here = ((leaves(dims[place]), step),) if step and length(leaves(dims[place])) != 1 else ()
    return Affine((*rest, *here), _plain(source.constant + step * start))


def _index(known: Known, node: Node, dims: Dims) -> Affine | None:
    behind = gathered(known, node, dims)
    return affine(known, *behind) if behind is not None else None


def _diff(known: Known, node: Node, dims: Dims) -> Affine | None:
    """Steps between neighbours of an index that is continued to the left: 1 everywhere."""
    given = arguments(node)
    if given["n"] != 1 or given["append"] is not None or given["prepend"] is None:
        return None
    place = given["dim"] % len(dims)
    before = affine(known, given["prepend"], [*dims[:place], (), *dims[place + 1 :]])
    index = affine(known, given["self"], dims)
    if index is None or before is None or shape_of(given["prepend"])[place] != 1:
        return None
    step = dict(index.weights).get(leaves(dims[place]), 0)
    rest = tuple(entry for entry in index.weights if entry[0] != leaves(dims[place]))
    return Affine((), step) if before == Affine(rest, _plain(index.constant - step)) else None


def _cumsum(known: Known, node: Node, dims: Dims) -> Affine | None:
    index = affine(known, node.args[0], dims)
    return index if index == Affine((), 0) else None


def _equal(known: Known, node: Node, dims: Dims) -> Affine | None:
    """A comparison that comes out the same everywhere, as 0 or 1."""
    parts = [affine(known, operand, _operand_dims(operand, node, dims)) for operand in node.args[:2]]
    if parts[0] is None or parts[1] is None:
        return None
    difference = parts[0].plus(parts[1], -1)
    if difference.weights or not isinstance(difference.constant, int):
        return None
    return Affine((), int((difference.constant == 0) == (spelled(node) == "eq")))


def gathered(known: Known, node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """The tensor behind an index by 0, 1, 2, … along each of its dimensions, with the dimensions that this gives it."""
    if spelled(node) != "index":
        return None
    source: Any = node.args[0]
    places: Any = node.args[1]
    sizes, found = shape_of(source), []
    if not isinstance(places, (list, tuple)) or len(places) != len(sizes) or not all(is_tensor(place) for place in places):
        return None
    for size, place in zip(sizes, places, strict=True):
        index = affine(known, place, aligned(dims, shape_of(place), shape_of(node)))
        if index is None or not _is_whole(index, size):
            return None
        found.append(index.weights[0][0] if index.weights else ())
    return source, found


def _is_whole(index: Affine, size: Any) -> bool:
    if index.constant != 0 or len(index.weights) > 1 or any(weight != 1 for _, weight in index.weights):
        return False
    return bool((length(index.weights[0][0]) if index.weights else 1) == size)


_READERS: dict[str, Callable[[Known, Node, Dims], Affine | None]] = {
    "slice": _slice,
    "index": _index,
    "diff": _diff,
    "cumsum": _cumsum,
    "eq": _equal,
    "ne": _equal,
}


def _constant_index(known: Known, node: Node, dims: Dims) -> Affine | None:
    """A constant vector first, first + 1, first + 2, …"""
    tensor = known.tensor(node)
    long = [place for place, size in enumerate(tensor.shape) if size != 1] if tensor is not None else []
    if tensor is None or len(long) != 1:
        return None
    row = tensor.flatten().to(torch.int64)
    is_index = torch.equal(row - row[0], torch.arange(len(row)))
    return Affine(((leaves(dims[long[0]]), 1),), int(row[0])) if is_index else None


@dataclass(frozen=True)
class Strip:
    """True where  low <= index along `plus` - index along `minus` <= high; None is unbounded."""

    plus: Dim
    minus: Dim
    low: int | None = None
    high: int | None = None

    def swapped(self) -> Strip:
        low = -self.high if self.high is not None else None
        return Strip(self.minus, self.plus, low, -self.low if self.low is not None else None)


def compared(known: Known, node: Node, dims: Dims, *, negated: bool) -> Strip | bool | None:
    """What a comparison of two positions says: a strip, the same everywhere, or None if it is something else."""
    name = spelled(node)
    if name in ("eq", "ne"):
        same = _equal(known, node, dims)
        return None if same is None else bool(same.constant) != negated
    if negated:
        name = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}.get(name, "")
    if name not in ("lt", "le", "gt", "ge"):
        return None
    window = _window(known, node, dims, name)
    if window is not None:
        return window
    parts = [affine(known, operand, _operand_dims(operand, node, dims)) for operand in node.args[:2]]
    if parts[0] is None or parts[1] is None:
        return None
    low, high = (parts[0], parts[1]) if name in ("lt", "le") else (parts[1], parts[0])
    difference = high.plus(low, -1)  # holds where this is >= 0, or > 0
    if name in ("lt", "gt"):
        difference = Affine(difference.weights, _plain(difference.constant - 1))
    return _strip(difference)


def _window(known: Known, node: Node, dims: Dims, name: str) -> Strip | None:
    """|column - row| <= width, either way round."""
    inner, width = node.args[:2] if name in ("lt", "le") else node.args[1::-1]
    bound = affine(known, width, _operand_dims(width, node, dims))
    if spelled(inner) != "abs" or bound is None or bound.weights or not isinstance(bound.constant, int):
        return None
    distance = affine(known, inner.args[0], _operand_dims(inner, node, dims))  # type: ignore[union-attr]
    strip = _strip(distance) if distance is not None else None
    if not isinstance(strip, Strip) or strip.low is None:
        return None
    most = bound.constant - (1 if name in ("lt", "gt") else 0)
    return Strip(strip.plus, strip.minus, strip.low - most, strip.low + most)


def _strip(difference: Affine) -> Strip | bool | None:
    """Where an affine value is not negative."""
    smallest, largest = _range(difference)
    if smallest is not None and smallest >= 0:
        return True
    if largest is not None and largest < 0:
        return False
    weights = dict(difference.weights)
    if sorted(weights.values()) != [-1, 1] or not isinstance(difference.constant, int):
        return None
    plus, minus = (next(dim for dim, weight in weights.items() if weight == sign) for sign in (1, -1))
    return Strip(plus, minus, low=-difference.constant)


def _range(value: Affine) -> tuple[int | None, int | None]:
    """The least and the greatest value where they are known numbers."""
    smallest = largest = value.constant
    for dim, weight in value.weights:
        end = weight * (length(dim) - 1)
        smallest, largest = (smallest, largest + end) if weight > 0 else (smallest + end, largest)
    plain: Sequence[Any] = [_plain(smallest), _plain(largest)]
    return tuple(bound if isinstance(bound, int) else None for bound in plain)  # type: ignore[return-value]
