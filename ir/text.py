"""The text form of a graph: short, readable, the same in every process, and the format of golden files.

    graph norm(x: f32[4,64]) -> v1
    const weight : f32[64] # 5f70bf18a086
    v0 = mean(x, dim=[-1], keepdim=True) : f32[4,1]

Values are numbered in order; inputs and constants keep their names; attributes that have the schema's default are left out, the others are
sorted by name; symbolic sizes are renamed s0, s1, … by first use. `paretorch.ir.parse` reads it back.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import re
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from paretorch.ir.graph import Graph, has_values, type_of
from paretorch.ir.ops import op_of
from paretorch.ir.types import DTYPE_NAMES, TensorType, TupleType, Type, size_of

_RESERVED = re.compile(r"inf|nan|None|True|False|Max|Min|Mod|s\d+|[\d.]+e?\d*j?|.*\.|" + "|".join(DTYPE_NAMES.values()))
_HASHES: Any = WeakTensorKeyDictionary()  # by identity: tensors have no truth value to compare by


def print_graph(graph: Graph, *, hashes: bool = True) -> str:
    """The text. hashes: end const lines with the first 12 hex digits of the tensor's sha256."""
    return "\n".join(_Printer(graph).lines(hashes)) + "\n"


def print_plain(graph: Graph) -> str:
    """The text without any name that the user or capture chose: equal for graphs of equal structure."""
    head, _, body = "\n".join(_Printer(graph, plain=True).lines(hashes=False)).partition("\n")
    return f"({head.split('(', 1)[1]}\n{body}\n"


def constants_in_order(graph: Graph) -> list[str]:
    """The names of the constants in the order in which calls take them."""
    named = {name: str(node.target) for node, name in _plain_names(graph).items() if node.op == "get_attr"}
    return [named[name] for name in sorted(named)]


def print_node(graph: Graph, node: Node) -> str:
    """The line of one node, with the numbers that it has in the whole graph's text."""
    return _Printer(graph).line(node)


def tensor_hash(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, computed once per tensor."""
    found: str | None = _HASHES.get(tensor)
    if found is None:
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{DTYPE_NAMES[plain.dtype]}{list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        found = digest.hexdigest()
        _HASHES[tensor] = found
    return found


class SymbolNames:
    """Symbolic sizes renamed s0, s1, … by first use."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def size(self, size: Any) -> Any:
        """An int as it is; an expression with renamed symbols."""
        if isinstance(size, int):
            return size
        for symbol in sorted(size.free_symbols, key=str):
            if symbol not in self.known:
                self.known[symbol] = sympy.Symbol(f"s{len(self.known)}", integer=True, positive=symbol.is_positive)
        return size.xreplace(self.known)

    def type(self, type_: Type) -> str:
        """The type's text."""
        if isinstance(type_, TupleType):
            return f"({', '.join(self.type(item) for item in type_.items)})"
        if isinstance(type_, TensorType) and not type_.is_static:
            return str(TensorType(type_.dtype, tuple(self.size(size) for size in type_.shape)))
        return str(type_)


class _Printer:
    def __init__(self, graph: Graph, *, plain: bool = False) -> None:
        """plain: constants and inputs are named by number as well."""
        self.graph, self.plain = graph, plain
        self.symbols = SymbolNames()
        self.names = _plain_names(graph) if plain else _names(graph)

    def lines(self, hashes: bool) -> list[str]:
        inputs = ", ".join(f"{self.names[node]}: {self.type(node)}" for node in self.graph.inputs)
        outputs = ", ".join(self.value(value) for value in self.graph.outputs)
        head = f"graph {self.graph.name}({inputs}) -> {outputs}"
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        constants: dict[str, tuple[int, str, str]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                name = self.names[node]
                tensor = self.graph.constants[str(node.target)]
                mark = f" # {tensor_hash(tensor)[:12]}" if hashes and has_values(tensor) else ""
                known = [constants[name][0]] if name in constants else []
                alias = "" if self.plain or name == node.target else f" = {str(node.target)!r}"
                first = min([*known, *(order[user] for user in node.users)], default=0)
                constants[name] = (first, name, f"const {name}{alias} : {self.type(node)}{mark}")
        body = [self.line(node) for node in self.graph.calls]
        return [head, *(line for *_, line in sorted(constants.values())), *body]

    def line(self, node: Node) -> str:
        return f"{self.names[node]} = {op_name(node)}({', '.join(self.arguments(node))}) : {self.type(node)}"

    def type(self, node: Node) -> str:
        return self.symbols.type(type_of(node))

    def arguments(self, node: Node) -> list[str]:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return [self.value(arg) for arg in node.args]
        positional: list[str] = []
        named: dict[str, str] = {}
        for i, parameter in enumerate(schema.arguments):
            given = i < len(node.args) or parameter.name in node.kwargs
            value = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)
            if not given or parameter.name in ("layout", "pin_memory") or (parameter.name == "device" and _is_host(value)):
                continue
            if value is None and parameter.default_value is None and parameter.has_default_value():
                continue
            if _holds_node(value) and len(positional) == i and not parameter.kwarg_only:
                positional.append(self.value(value))
            elif not (parameter.has_default_value() and _equal(value, parameter.default_value)):
                named[parameter.name] = self.value(value)
        return [*positional, *(f"{name}={named[name]}" for name in sorted(named))]

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names.get(value, value.name)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES[value]
        if isinstance(value, (torch.SymInt, sympy.Expr)):
            return str(self.symbols.size(size_of(value) if isinstance(value, torch.SymInt) else value))
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return f"'{value}'"
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return str(value.node.expr)
        return repr(value)


def _names(graph: Graph) -> dict[Node, str]:
    """Constants and inputs by their own names, unless these cannot be read in the text; calls by number."""
    taken: dict[str, Any] = {}

    def free(name: str, owner: Any) -> str:
        name = re.sub(r"[^\w.]", "_", name) or "_"
        while _RESERVED.fullmatch(name) or taken.get(name, owner) != owner:
            name += "_"
        taken[name] = owner
        return name

    names = {node: free(str(node.target), str(node.target)) for node in graph.nodes if node.op == "get_attr"}
    names |= {node: free(str(node.target), node) for node in graph.inputs}
    numbers = (f"v{number}" for number in itertools.count())
    return names | {node: next(name for name in numbers if name not in taken) for node in graph.calls}


def _plain_names(graph: Graph) -> dict[Node, str]:
    """Inputs in their order, constants in the order in which calls take them; calls by number."""
    names = {node: f"input{i}" for i, node in enumerate(graph.inputs)}
    constants: dict[str, str] = {}
    for user in graph.nodes:
        for node in user.all_input_nodes:
            if node.op == "get_attr":
                names[node] = constants.setdefault(str(node.target), f"const{len(constants):06}")
    for node in graph.nodes:
        if node.op == "get_attr" and node not in names:
            names[node] = constants.setdefault(str(node.target), f"const{len(constants):06}")
    return names | {node: f"v{i}" for i, node in enumerate(graph.calls)}


def op_name(node: Node) -> str:
    """The row's name for its first overload, row.overload for another of its overloads, namespace::op.overload without a row."""
    op = op_of(node)
    target: Any = node.target
    if op is None and not hasattr(target, "_schema"):
        return f"python::{getattr(target, '__name__', target)}"
    if op is None:
        return f"{target._schema.name}.{target._overloadname}"
    if target is op.targets[0] or getattr(target, "__module__", "") == operator.__name__:
        return op.name
    packet, overload = target._schema.name.split("::")[-1], target._overloadname
    return f"{op.name}:{packet}.{overload}"


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(isinstance(item, Node) for item in value))


def _is_host(device: Any) -> bool:
    return device is None or torch.device(device).type in ("cpu", "meta")


def _equal(value: Any, default: Any) -> bool:
    return not _holds_node(value) and type(value) is type(default) and bool(value == default)
