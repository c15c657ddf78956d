"""Lengths after a rewrite: walk downstream of values whose token axis has another length now, repair what had the old one baked in.

Sizes of views and expands, ends of slices and parts of splits that were the old length become the new one; all else is evaluated again.
What cannot be repaired (constants per position, grids, windows, the model's outputs) is refused with a PlanError that names the node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.facts import Atom, AxisFacts, Use
from paretorch.ir.errors import PlanError, ShapeError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import aten, op_of
from paretorch.ir.types import Size, TensorType, TupleType, from_fake

END = 2**63 - 1  # a slice to the end, as export writes it


@dataclass
class State:
    """What differs in one value. sizes: the new sizes of its atoms; touched: the changed axes that it comes from."""

    sizes: dict[Atom, Size] = field(default_factory=dict)
    touched: set[Atom] = field(default_factory=set)


def rederive_lengths(
    graph: Graph, facts_before: AxisFacts, changed: Mapping[str, tuple[Atom, Size]], *, may_return: bool = False,
    along: Mapping[Atom, Size] | None = None,
) -> Graph:  # fmt: skip
    """The graph with the lengths downstream of `changed` repaired, edited in place.

    graph: a copy in which some nodes have values with a shortened (or lengthened) axis; facts_before: of the graph before that edit;
    changed: for each such node, new or old, the axis and its size now (its old size says that the axis is whole again there); a size is an
    int or a sympy expression; may_return: whether outputs of the graph may have the new length; along: other axes that all of these have another
    size of, such as their batch.
    Raises PlanError, naming the node, where the new length is not legal.
    """
    repair = _Repair(graph, facts_before, changed, may_return, along or {})
    for node in list(graph.fx.nodes):
        repair.visit(node)
    return graph


class _Repair:
    def __init__(
        self, graph: Graph, facts: AxisFacts, changed: Mapping[str, tuple[Atom, Size]], may_return: bool, along: Mapping[Atom, Size]
    ) -> None:
        self.graph, self.maps, self.changed, self.may_return, self.along = graph, facts.maps, changed, may_return, along
        self.states: dict[Node, State] = {}
        self.forbidding: dict[str, list[tuple[Atom, Use]]] = defaultdict(list)
        for axis in facts.tokens:
            for use in axis.uses:
                if use.reason:
                    self.forbidding[use.node].append((axis.atom, use))

    def visit(self, node: Node) -> None:
        state = self._incoming(node)
        if state.sizes and node.op == "output":
            self._refuse_returns(node)
        elif state.sizes and node.op == "call_function":
            self._refuse_forbidden(node, state)
            self._repair(node, state)
            self._evaluate(node, state)
            state = self._outgoing(node, state)
        if node.name in self.changed:
            state = self._declared(node, state)
        if state.sizes:
            self.states[node] = state

    def _incoming(self, node: Node) -> State:
        state = State()
        for argument in node.all_input_nodes:
            before = self.states.get(argument)
            if before:
                state.sizes.update(before.sizes)
                state.touched |= before.touched
        return state

    def _declared(self, node: Node, state: State) -> State:
        atom, size = self.changed[node.name]
        found = from_fake(node.meta["val"])
        if isinstance(found, TensorType) and size not in found.shape:
            raise PlanError(f"{node.name} is said to have an axis of {size}, but it is {found}")
        sizes = {**state.sizes, **self.along, atom: size}
        if size == atom.size:
            del sizes[atom]
        return State(sizes, state.touched | {atom, *self.along})

    def _refuse_returns(self, node: Node) -> None:
        for number, value in enumerate(node.args[0]):  # type: ignore[arg-type]
            state = self.states.get(value) if isinstance(value, Node) else None
            if state and not self.may_return:
                lengths = ", ".join(f"{atom.size} is now {size}" for atom, size in state.sizes.items())
                raise PlanError(f"output {number} of the model, {value.name}, would change its shape: {lengths}")

    def _refuse_forbidden(self, node: Node, state: State) -> None:
        op = op_of(node)
        for atom, use in self.forbidding[node.name]:
            by_evaluation = use.kind == "positions" and op is not None and op.axes in ("pointwise", "attention", "addmm", "matmul")
            if atom in state.touched and not by_evaluation:
                raise PlanError(f"{use.reason}; its length cannot change here{_now(state)}")

    def _evaluate(self, node: Node, state: State) -> None:
        """Compute the type again; a mismatch means that a value of the old length meets one of the new."""
        old = node.meta["val"]
        self._refuse_meeting(node, state)
        try:
            node.meta["val"] = self._value(node)
        except ShapeError as error:
            raise PlanError(f"{self._meeting(node, state)}: {error}") from error
        if isinstance(old, (tuple, list)) and len(old) != len(node.meta["val"]):
            raise PlanError(f"{node.name} ({origin_of(node)}) made {len(old)} values and now makes {len(node.meta['val'])}{_now(state)}")
        self._refuse_silent_broadcast(node, state)

    def _meeting(self, node: Node, state: State) -> str:
        reasons = [use.reason for atom, use in self.forbidding[node.name] if atom in state.touched]
        reason = f"{reasons[0]}; " if reasons else ""
        return f"{reason}at {node.name} ({origin_of(node)}) values of the old and of the new length meet{_now(state)}"

    def _refuse_meeting(self, node: Node, state: State) -> None:
        """Elementwise operands, and an attention's mask, must have lengths that fit."""
        op = op_of(node)
        if op is None or op.axes not in ("pointwise", "attention"):
            return
        shapes = {argument: _shape(argument) for argument in node.all_input_nodes}
        wanted: list[list[Any]] = [list(reversed(shape)) for shape in shapes.values()]
        if op.axes == "attention":
            given = arguments(node)
            mask, bias = given.get("mask", given.get("attn_mask")), given.get("key_bias")
            keys, queries = _shape(given["key"])[-2], _shape(given["query"])[-2]
            wanted = [[keys, queries]]
            wanted += [[*reversed(_shape(mask))][:2]] if mask is not None else []
            wanted += [[_shape(bias)[-1]]] if bias is not None else []
        for sizes in zip_longest(*wanted, fillvalue=1):
            if len({size for size in sizes if isinstance(size, int) and size != 1}) > 1:
                operands = ", ".join(f"{argument.name}: {list(shape)}" for argument, shape in shapes.items())
                raise PlanError(f"{self._meeting(node, state)}: {operands}")

    def _value(self, node: Node) -> Any:
        try:
            return self.graph.evaluate(node.target, node.args, dict(node.kwargs))
        except ShapeError:
            if node.target is not aten("view.default"):
                raise
            node.target = aten("reshape.default")  # the new value's strides may not allow a view
            return self.graph.evaluate(node.target, node.args, dict(node.kwargs))

    def _refuse_silent_broadcast(self, node: Node, state: State) -> None:
        """An axis shortened to 1 would broadcast against values of the old length instead of failing."""
        op = op_of(node)
        if op is None or op.axes != "pointwise" or 1 not in state.sizes.values() or node.name not in self.maps:
            return
        single = {atom for atom, size in state.sizes.items() if size == 1}
        for atoms, size in zip(self.maps[node.name], _shape(node), strict=True):
            if single & set(atoms) and size != 1 and len(atoms) == 1:
                raise PlanError(self._meeting(node, state))

    def _outgoing(self, node: Node, state: State) -> State:
        """What differs in the node's value, read from its new type; a node that was not there before passes on all."""
        found, axes = from_fake(node.meta["val"]), self.maps.get(node.name)
        if isinstance(found, TupleType) or axes is None:
            return state
        if not isinstance(found, TensorType) or len(axes) != found.rank:
            return State()
        sizes: dict[Atom, Size] = {}
        for atoms, size in zip(axes, found.shape, strict=True):
            if size == _product(atoms, {}):
                continue
            if len(atoms) == 1:
                sizes[atoms[0]] = size
            elif size == _product(atoms, state.sizes):
                sizes.update({atom: state.sizes[atom] for atom in atoms if atom in state.sizes})
            else:
                raise PlanError(
                    f"{node.name} ({origin_of(node)}) has a dimension of {size} now; {_product(atoms, {})} was a product of axes"
                )
        return State(sizes, set(state.touched)) if sizes else State()

    # repairs, by the axis rule of the op

    def _repair(self, node: Node, state: State) -> None:
        op = op_of(node)
        repairs = {"view": self._view, "expand": self._expand, "slice": self._slice, "split": self._split}
        if op is not None and op.axes in repairs and node.name not in self.changed:
            repairs[op.axes](node, state)

    def _view(self, node: Node, state: State) -> None:
        axes, x = self.maps.get(node.name), node.args[0]
        if axes is None or not isinstance(x, Node) or node.target is aten("flatten.using_ints"):
            return
        here = {atom for atoms in self.maps.get(x.name, ()) for atom in atoms}
        lost = [atom for atom in state.sizes if atom in here and not any(atom in atoms for atoms in axes)]
        if lost:
            raise PlanError(f"{node.name} ({origin_of(node)}) splits or blends the axis of {lost[0].size}{_now(state)}")
        unflattens = node.target is aten("unflatten.int")
        sizes = [_product(atoms, {}) for atoms in axes] if unflattens else list(node.args[1])  # type: ignore[arg-type]
        fresh = [_product(atoms, state.sizes) if set(atoms) & set(state.sizes) else size for atoms, size in zip(axes, sizes, strict=True)]
        fresh = [-1 if old == -1 else new for old, new in zip(sizes, fresh, strict=True)]
        if unflattens:
            node.target = aten("reshape.default")
        node.args = (x, self._size_arguments(node, x, fresh))

    def _size_arguments(self, node: Node, x: Node, sizes: Sequence[Any]) -> list[Any]:
        """Sizes as arguments: a symbolic one is the -1 if there is none yet, else it is read from the input."""
        made, shape = list(sizes), _shape(x)
        for place, size in enumerate(sizes):
            if isinstance(size, (int, Node)):
                continue
            if -1 not in made:
                made[place] = -1
            elif size in shape:
                made[place] = self.graph.call(aten("sym_size.int"), (x, shape.index(size)), before=node)
                made[place].meta["origin"] = origin_of(node)
            else:
                raise PlanError(f"{node.name} ({origin_of(node)}) would need the size {size}, which no dimension of its input {x.name} has")
        return made

    def _expand(self, node: Node, state: State) -> None:
        axes, x = self.maps.get(node.name), node.args[0]
        if axes is None or not isinstance(x, Node):
            return
        sizes, rank = list(node.args[1]), len(_shape(x))  # type: ignore[arg-type]
        for place, atoms in enumerate(axes):
            if set(atoms) & set(state.sizes) and place >= len(sizes) - rank:
                sizes[place] = -1
        node.args = (x, sizes)

    def _slice(self, node: Node, state: State) -> None:
        x = node.args[0]
        axes = self.maps.get(x.name, self.maps.get(node.name)) if isinstance(x, Node) else None
        if axes is None or node.target is not aten("slice.Tensor"):
            return
        args: list[Any] = [*node.args, *[0, 0, None, END, 1][len(node.args) :]]
        dim, start, end = args[1] % len(axes), args[2] or 0, args[3]
        if not set(axes[dim]) & set(state.sizes):
            return
        old, new = _product(axes[dim], {}), _product(axes[dim], state.sizes)
        end = from_fake(end.meta["val"]).expression if isinstance(end, Node) else end  # type: ignore[union-attr]
        if end is None or end == old or (isinstance(end, int) and end >= END // 2):
            args[3] = END
        elif isinstance(new, int) and isinstance(end, int) and max(start, end) > new:
            raise PlanError(f"{node.name} ({origin_of(node)}) takes {start}:{end} of an axis of {old}{_now(state)}")
        node.args = tuple(args)

    def _split(self, node: Node, state: State) -> None:
        """Sizes of parts: the last part takes the difference, as the earlier ones are tokens at fixed places."""
        x = node.args[0]
        axes = self.maps.get(x.name) if isinstance(x, Node) else None
        if axes is None or node.target is not aten("split_with_sizes.default"):
            return
        atoms = axes[arguments(node)["dim"] % len(axes)]
        if set(atoms) & set(state.sizes):
            sizes = list(node.args[1])  # type: ignore[arg-type]
            last = sizes[-1] + _product(atoms, state.sizes) - _product(atoms, {})
            if not isinstance(last, int) or last < 0:
                raise PlanError(f"{node.name} ({origin_of(node)}) splits an axis into {sizes}{_now(state)}")
            node.args = (x, [*sizes[:-1], last], *node.args[2:])


def _shape(node: Node) -> tuple[Size, ...]:
    found = from_fake(node.meta["val"])
    return found.shape if isinstance(found, TensorType) else ()


def _product(atoms: Sequence[Atom], sizes: Mapping[Atom, Size]) -> Any:
    total: Any = 1
    for atom in atoms:
        total = total * sizes.get(atom, atom.size)
    return total


def _now(state: State) -> str:
    return "".join(f", {atom.size} is now {size}" for atom, size in state.sizes.items())
