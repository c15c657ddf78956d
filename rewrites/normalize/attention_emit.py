"""Writing values out in wanted axes: the fewest views, permutes and expands from what there is.

What the same call has written before is used again (layers share masks), and what comes from constants alone is computed at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, Origin, shape_of
from paretorch.ir.ops import aten
from paretorch.ir.types import DTYPES, Size
from paretorch.rewrites.normalize.attention_softmax import Unraised
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, leaves, length
from paretorch.rewrites.normalize.masks_known import LARGEST


class Emitter:
    """Emits into one graph; `at` moves to the next attention, in the order of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._written: dict[Any, Node] = {}
        self._tensors: list[Tensor] = []
        self._builder = Builder(graph)

    def at(self, before: Node, origin: Origin) -> None:
        """Emit before this node from now on."""
        self._builder = Builder(self.graph, before, origin=origin)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call; one that was made before is used again."""
        key = (target, _frozen(args), _frozen(kwargs))
        if key not in self._written:
            self._written[key] = self._folded(target, args, kwargs) or self._builder.call(target, args, kwargs)
        return self._written[key]

    def constant(self, name: str, tensor: Tensor) -> Node:
        key = (name, id(tensor))
        if key not in self._written:
            self._tensors.append(tensor)  # keeps its id from being given to another
            self._written[key] = self._builder.constant(name, tensor)
        return self._written[key]

    def number(self, value: float, dtype: str) -> Node:
        """A constant of one element."""
        key = (value, dtype)
        if key not in self._written:
            self._written[key] = self._builder.constant("number", torch.tensor(value, dtype=DTYPES[dtype]))
        return self._written[key]

    def _folded(self, target: Any, args: Any, kwargs: Any) -> Node | None:
        nodes: list[Node] = []
        torch.fx.node.map_arg((args, kwargs), nodes.append)
        if not nodes or any(node.op != "get_attr" for node in nodes):
            return None
        values = torch.fx.node.map_arg((args, kwargs), lambda node: self.graph.constants[str(node.target)])
        with torch.no_grad():
            made = target(*values[0], **values[1])
        return self._builder.constant(f"{nodes[0].target}_mask", made) if made.numel() <= LARGEST else None

    # axes

    def arrange(self, node: Node, dims: Dims, groups: Sequence[Dim], *, full: bool) -> Node:
        """The value with one dimension per group of axes. An axis that it lacks is expanded if `full` or if others of the group are
        there, else the dimension is 1. Raises Unraised if it has axes in no group or a size has no name.
        """
        wanted = [_long(group) for group in groups]
        mine = {axis for dim in dims for axis in _long(dim)}
        if mine - {axis for group in wanted for axis in group}:
            raise Unraised(f"{node.name} varies along an axis that queries and keys do not have")
        held = [tuple(axis for axis in group if axis in mine) for group in wanted]
        node, dims = self._ordered(node, dims, held)
        if all(not here or here == group for here, group in zip(held, wanted, strict=True)):
            node = self.viewed(node, [length(here) for here in held])
        else:
            node = self._interleaved(node, wanted, mine)
        return self.expanded(node, [length(group) for group in wanted]) if full else node

    def permutes(self, dims: Dims, wanted: Sequence[Dim]) -> bool:
        """Whether the axes stand in another order in what is wanted."""
        return [axis for dim in dims for axis in _long(dim)] != [axis for dim in wanted for axis in _long(dim)]

    def _ordered(self, node: Node, dims: Dims, held: Sequence[Dim]) -> tuple[Node, Dims]:
        """The same axes in the wanted order."""
        order = [axis for group in held for axis in group]
        now = [_long(dim) for dim in dims]
        if [axis for dim in now for axis in dim] == order:
            return node, list(now)
        rank = {axis: place for place, axis in enumerate(order)}
        pieces = [piece for dim in now for piece in _runs(dim, rank, held)]
        node = self.viewed(node, [length(piece) for piece in pieces])
        places = _places(pieces, rank, held)
        return self.emit(aten("permute.default"), node, places), [pieces[place] for place in places]

    def _interleaved(self, node: Node, wanted: Sequence[Dim], mine: set[Axis]) -> Node:
        """Groups of which only some axes are there: those that lack are expanded before they merge."""
        split: list[Size] = []
        wide: list[Size] = []
        whole: list[Size] = []
        for group in wanted:
            if not mine & set(group):
                split, wide, whole = [*split, 1], [*wide, 1], [*whole, 1]
                continue
            split += [axis.size if axis in mine else 1 for axis in group]
            wide += [axis.size for axis in group]
            whole.append(length(group))
        return self.viewed(self.expanded(self.viewed(node, split), wide), whole)

    def viewed(self, node: Node, sizes: Sequence[Size]) -> Node:
        """The value with these sizes; reshape, since its strides are not known."""
        if shape_of(node) == tuple(sizes):
            return node
        named = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
        plain = [size if isinstance(size, int) else -1 if place == named[0] else self.size(size, node) for place, size in enumerate(sizes)]
        return self.emit(aten("reshape.default"), node, plain)

    def expanded(self, node: Node, sizes: Sequence[Size]) -> Node:
        have = shape_of(node)
        if have == tuple(sizes):
            return node
        return self.emit(
            aten("expand.default"), node, [-1 if h == size else self.size(size, node) for h, size in zip(have, sizes, strict=True)]
        )

    def size(self, size: Size, near: Node) -> Any:
        """A number, or a node that makes this size. Raises Unraised if no input or nearby value has it."""
        if isinstance(size, int):
            return size
        places = [
            (node, place)
            for node in (*self.graph.inputs, near)
            if hasattr(node.meta["val"], "shape")
            for place, found in enumerate(shape_of(node))
            if found == size
        ]
        if places:
            existing = [there for node, place in places if (there := self._existing_size(node, place)) is not None]
            return existing[0] if existing else self.emit(aten("sym_size.int"), *places[0])
        number, symbols = sympy.sympify(size).as_coeff_mul()
        if number.is_Integer and (number != 1 or len(symbols) > 1):
            made: Any = int(number)
            for symbol in symbols:
                factor = self.size(symbol, near)
                made = factor if isinstance(made, int) and made == 1 else self.emit(operator.mul, factor, made)
            return made
        raise Unraised(f"no input has the size {size}, which {near.name} needs")

    def _existing_size(self, node: Node, place: int) -> Node | None:
        for user in node.users:
            if user.target is aten("sym_size.int") and user.args == (node, place) and user.op == "call_function":
                return user if node.op == "placeholder" and _early(user) else None
        return None

    # arithmetic

    def cast(self, node: Node, dtype: str) -> Node:
        """The value in another type; a float mask that is too low for a narrower type keeps its lowest number."""
        target = DTYPES[dtype]
        if node.meta["val"].dtype == target:
            return node
        if node.meta["val"].dtype.is_floating_point and torch.finfo(node.meta["val"].dtype).max > torch.finfo(target).max:
            node = self.emit(aten("clamp.default"), node, torch.finfo(target).min)
        return self.emit(aten("_to_copy.default"), node, dtype=target)


def _early(user: Node) -> bool:
    """Whether only inputs, constants and sizes stand before this node."""
    node = user.prev
    while node.op != "root":
        if node.op == "call_function" and node.target is not aten("sym_size.int"):
            return False
        node = node.prev
    return True


def _long(dim: Sequence[Axis]) -> Dim:
    return tuple(axis for axis in leaves(dim) if axis.size != 1)


def _runs(dim: Dim, rank: dict[Axis, int], held: Sequence[Dim]) -> list[Dim]:
    """A dimension cut where its axes are not neighbours in the wanted order or belong to different groups."""
    group_of = {axis: number for number, group in enumerate(held) for axis in group}
    runs: list[Dim] = [()]
    for axis in dim:
        last = runs[-1][-1] if runs[-1] else None
        if last is not None and (rank[axis] != rank[last] + 1 or group_of[axis] != group_of[last]):
            runs.append(())
        runs[-1] = (*runs[-1], axis)
    return runs


def _places(pieces: Sequence[Dim], rank: dict[Axis, int], held: Sequence[Dim]) -> list[int]:
    """The order in which to permute pieces; pieces of size 1 stand where a group has nothing, as far as there are such."""
    spare = [place for place, piece in enumerate(pieces) if not piece]
    order: list[int] = []
    for group in held:
        if group:
            order += sorted(
                (place for place, piece in enumerate(pieces) if piece and piece[0] in group), key=lambda place: rank[pieces[place][0]]
            )
        elif spare:
            order.append(spare.pop(0))
    return [*spare, *order]


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return value
