"""The verifier: what holds for every graph, whichever capture, pass or rule made it.

Values are defined before they are used, constants exist and have the types that are stated, every call computes the type that its node
states, nothing writes into a value, and the last node, the only output, holds known values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from paretorch.ir.errors import ShapeError, VerifyError
from paretorch.ir.graph import Graph, origin_of
from paretorch.ir.text import op_name, print_node
from paretorch.ir.types import TensorType, TupleType, Type, from_fake

_POINTS = ((5040, 55440, 10080, 65520), (25200, 85680, 95760, 15120))  # sizes at which two expressions are compared; divisible by most


def verify(graph: Graph, after: str = "") -> None:
    """after: the name of the rule that made this graph, for the message. Raises VerifyError.

    What calls compute is remembered with the graph's fake mode, so that a graph with few new nodes is verified quickly.
    """
    _Verifier(graph, after).run()


class _Verifier:
    def __init__(self, graph: Graph, after: str) -> None:
        self.graph, self.after = graph, after
        self.types: dict[Node, Type] = {}
        self.computed: dict[Any, Type] = graph.fake_mode.__dict__.setdefault("_paretorch_types", {})

    def run(self) -> None:
        checks: dict[str, Callable[[Node], None]] = {
            "placeholder": self.state, "get_attr": self.constant, "call_function": self.call, "output": self.output,
        }  # fmt: skip
        nodes = self.graph.nodes
        if not nodes or nodes[-1].op != "output":
            raise self.fault("the graph does not end with its output", nodes[-1] if nodes else None)
        for node in nodes:
            if node.op not in checks:
                raise self.fault(f"{node.name} is a {node.op}; expected one of {', '.join(checks)}", node)
            checks[node.op](node)

    def state(self, node: Node) -> None:
        """Keep the type that the node states."""
        if "val" not in node.meta:
            raise self.fault(f"{self.label(node)} has no type", node)
        try:
            self.types[node] = from_fake(node.meta["val"])
        except ShapeError as error:
            raise self.fault(f"{self.label(node)}: {error}", node) from error

    def constant(self, node: Node) -> None:
        name = str(node.target)
        if name not in self.graph.constants:
            raise self.fault(f"there is no constant {name}", node)
        self.state(node)
        stored = from_fake(self.graph.constants[name])
        if self.types[node] != stored:
            raise self.fault(f"{name} says {self.types[node]} but the constant is {stored}", node)

    def call(self, node: Node) -> None:
        self.arguments(node)
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise self.fault(f"{op_name(node)} writes into one of its arguments; expected a function of values", node)
        if not callable(node.target):
            raise self.fault(f"{node.target!r} cannot be called", node)
        self.state(node)
        found = self.computes(node)
        if not _same(self.types[node], found):
            raise self.fault(f"{self.label(node)} says {self.types[node]} but {op_name(node)} gives {found}", node)

    def output(self, node: Node) -> None:
        if node is not self.graph.output_node:
            raise self.fault("an output stands before the end of the graph", node)
        if len(node.args) != 1 or not isinstance(node.args[0], (tuple, list)):
            raise self.fault("the output does not hold one flat sequence of values", node)
        self.arguments(node)

    def arguments(self, node: Node) -> None:
        for argument in node.all_input_nodes:
            if argument not in self.types:
                user = "the output" if node.op == "output" else self.label(node)
                where = "is defined after it" if argument.graph is node.graph and not argument._erased else "is not in the graph"
                raise self.fault(f"{user} uses {self.label(argument)}, which {where}", node)

    def computes(self, node: Node) -> Type:
        """The type that this call gives for the types of its arguments."""
        key: Any = (node.target, self.key(node.args), self.key(node.kwargs))
        try:
            known = self.computed.get(key)
        except TypeError:  # an attribute that has no hash
            known, key = None, None
        if known is None:
            try:
                known = from_fake(self.graph.evaluate(node.target, node.args, dict(node.kwargs)))
            except ShapeError as error:
                raise self.fault(f"{self.label(node)}: {error}", node) from error
            if key is not None:
                self.computed[key] = known
        return known

    def key(self, value: Any) -> Any:
        """Equal for arguments that a call cannot tell apart by type."""
        if isinstance(value, Node):
            fake = value.meta["val"]
            layout = fake.stride() if isinstance(fake, torch.Tensor) and all(type(step) is int for step in fake.stride()) else ()
            return (self.types[value], layout)
        if isinstance(value, (list, tuple)):
            return tuple(self.key(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, self.key(value[name])) for name in sorted(value))
        return (type(value), str(value) if isinstance(value, (torch.SymInt, torch.SymFloat, slice)) else value)

    def label(self, node: Node) -> str:
        """The value's name in the printed graph."""
        if node.graph is not self.graph.fx or node.op != "call_function":
            return str(node.target) if node.op in ("placeholder", "get_attr") else node.name
        return f"v{self.graph.calls.index(node)}" if node in self.graph.calls else node.name

    def fault(self, sentence: str, node: Node | None) -> VerifyError:
        lines = [f"after {self.after}, {sentence}" if self.after else sentence]
        if node is not None and node.op == "call_function":
            typed = "val" in node.meta
            lines.append(f"  {print_node(self.graph, node) if typed else node.format_node()}     from {origin_of(node)}")
        if self.after:
            lines.append(f'  This is a fault in the rule. To go on without it: optimize(..., without=["{self.after}"])')
        return VerifyError("\n".join(lines))


def _same(stated: Type, found: Type) -> bool:
    """Equal; sizes that depend on data, or expressions that agree at all points tried, count as equal."""
    if stated == found:
        return True
    if isinstance(stated, TupleType) and isinstance(found, TupleType):
        return len(stated.items) == len(found.items) and all(map(_same, stated.items, found.items))
    if isinstance(stated, TensorType) and isinstance(found, TensorType):
        fits = stated.dtype == found.dtype and stated.rank == found.rank
        return fits and all(map(_same_size, stated.shape, found.shape))
    return type(stated) is type(found) and str(stated) == str(found)


def _same_size(stated: Any, found: Any) -> bool:
    symbols = sorted(sympy.sympify(stated).free_symbols | sympy.sympify(found).free_symbols, key=str)
    if stated == found or not symbols:
        return bool(stated == found)
    if any(str(symbol).startswith("u") for symbol in symbols):  # torch's name for a size that depends on data, new in each run
        return not isinstance(stated, int) and not isinstance(found, int)
    points = [{symbol: point[i % len(point)] + i // len(point) for i, symbol in enumerate(symbols)} for point in _POINTS]
    return all(sympy.sympify(stated).subs(point) == sympy.sympify(found).subs(point) for point in points)
