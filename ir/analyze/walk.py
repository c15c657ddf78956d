"""What the axis rules read and write while token_axes walks over a graph: dims of values, events, mixers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze.atoms import Atoms, Dim, Dims
from paretorch.ir.graph import Graph, origin_of
from paretorch.ir.ops import op_of
from paretorch.ir.types import Size, TensorType, from_fake


@dataclass(frozen=True)
class Event:
    """A node does to an axis something that is not pointwise. kind and reason: see Use; atoms: of the axes that it concerns."""

    node: str
    kind: str
    atoms: Dim
    reason: str = ""


@dataclass(frozen=True)
class Mixer:
    """A node in which a query axis reads a key axis, at each place of the outer axes. causal: some query may not see a later key."""

    node: str
    outer: Dim
    query: Dim
    key: Dim
    causal: bool


def place(node: Node) -> str:
    """The node with its place in the user's model, for sentences."""
    return f"{node.name} ({origin_of(node)})"


def nodes_in(argument: Any) -> list[Node]:
    """The nodes in an argument, in order."""
    if isinstance(argument, Node):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [node for part in argument for node in nodes_in(part)]
    return []


class Walk:
    """The state of one walk. `maps` holds for each tensor node its dims, for a node with several outputs a list of dims."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.atoms = Atoms()
        self.maps: dict[Node, Any] = {}
        self.events: list[Event] = []
        self.mixers: list[Mixer] = []
        self.restored: list[tuple[str, Dim]] = []  # nodes that bring merged tokens back, and the axis of their places
        self.constant: dict[Node, bool] = {}  # computed from constants only
        self.types: dict[Node, Any] = {}

    def type(self, node: Node) -> Any:
        if node not in self.types:
            self.types[node] = from_fake(node.meta["val"])
        return self.types[node]

    def shape(self, node: Node) -> tuple[Size, ...]:
        """The sizes of a tensor node."""
        found = self.type(node)
        return found.shape if isinstance(found, TensorType) else ()

    def is_tensor(self, argument: Any) -> bool:
        return isinstance(argument, Node) and isinstance(self.type(argument), TensorType)

    def dims(self, node: Node) -> Dims:
        """The dims of a tensor node."""
        return [self.atoms.resolve(dim) for dim in self.maps[node]]

    def event(self, node: Node, kind: str, dims: Iterable[Dim], reason: str = "") -> None:
        atoms = tuple(atom for dim in dims for atom in dim)
        if atoms:
            self.events.append(Event(node.name, kind, atoms, reason))

    def fresh(self, node: Node, shape: Sequence[Size]) -> Dims:
        """New dims for a value; weak if it is constant."""
        return [self.atoms.dim(size, node.name, weak=self.constant[node]) for size in shape]

    def one(self, node: Node, size: Size, parents: Iterable[int] = ()) -> Dim:
        return self.atoms.dim(size, node.name, weak=self.constant[node], parents=parents)

    def broadcast(self, operands: Sequence[Dims]) -> Dims:
        """Where values meet elementwise."""
        rank = max((len(dims) for dims in operands), default=0)
        met: Dims = [()] * rank
        for dims in operands:
            for place_, dim in enumerate(dims, rank - len(dims)):
                met[place_] = self.atoms.meet(met[place_], dim)
        return met

    def visit(self, node: Node) -> None:
        """Fill in the dims of one node. Its inputs have theirs."""
        from paretorch.ir.analyze.axis_rules import RULES

        if node.op in ("placeholder", "get_attr"):
            self.constant[node] = node.op == "get_attr"
            if self.is_tensor(node):
                self.maps[node] = self.fresh(node, self.shape(node))
            return
        if node.op == "output":
            self._returns(node)
            return
        tensors = [argument for argument in node.all_input_nodes if argument in self.maps]
        self.constant[node] = all(self.constant[argument] for argument in tensors)
        if node.target is operator.getitem:
            if tensors:
                self.maps[node] = self.maps[tensors[0]][node.args[1]]
            return
        found = self.type(node)
        if not _has_tensors(found):
            return
        op = op_of(node)
        rule = RULES.get(op.axes or "") if op else None
        made = rule(self, node) if rule else None
        self.maps[node] = made if made is not None and self._fits(made, found) else self._opaque(node, tensors, found)

    def _fits(self, made: Any, found: Any) -> bool:
        """Whether dims have the sizes of the type."""
        if isinstance(found, TensorType):
            return len(made) == found.rank and all(self.atoms.size(dim) == size for dim, size in zip(made, found.shape, strict=True))
        return len(made) == len(found.items) and all(self._fits(one, type_) for one, type_ in zip(made, found.items, strict=True))

    def _opaque(self, node: Node, tensors: Sequence[Node], found: Any) -> Any:
        """An op that says nothing about axes: what comes out has new axes, and none that went in may change its length."""
        entering = [dim for argument in tensors for dim in flat(self.maps[argument])]
        self.event(node, "opaque", entering, f"{place(node)} is {node.target}, and nothing is known of how it treats axes")
        if isinstance(found, TensorType):
            return self.fresh(node, found.shape)
        return [self.fresh(node, item.shape) if isinstance(item, TensorType) else [] for item in found.items]

    def _returns(self, node: Node) -> None:
        self.constant[node] = False
        for number, value in enumerate(nodes_in(node.args[0])):
            if value in self.maps:
                reason = f"output {number} of the model, {value.name}: {self.type(value)}, has this axis"
                self.event(node, "returns", flat(self.maps[value]), reason)


def flat(dims: Any) -> Dims:
    """All dims of a node, also of one with several outputs."""
    return [dim for part in dims for dim in (part if isinstance(part, list) else [part])]


def _has_tensors(found: Any) -> bool:
    return isinstance(found, TensorType) or any(_has_tensors(item) for item in getattr(found, "items", ()))


def is_masking(tensor: torch.Tensor) -> bool | None:
    """Whether a square mask hides some later key from a query and no earlier one; None if it hides nothing later."""
    if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return None
    hidden = ~tensor if tensor.dtype == torch.bool else tensor < -1e3
    return bool(hidden.triu(1).any()) or None
