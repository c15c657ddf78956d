"""The text form of a graph: short, readable, the same in every process, and the format of golden files.

    graph norm(x: f32[4,64]) -> v1
    const weight : f32[64] # 5f70bf18a086
    v0 = mean(x, dim=[-1], keepdim=True) : f32[4,1]

Values are numbered in order; inputs and constants keep their names; attributes that have the schema's default are left out, the others are
sorted by name; symbolic sizes are renamed s0, s1, … by first use. `paretorch.ir.parse` reads it back.
"""

from __future__ import annotations

import hashlib
import operator
import re
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from paretorch.ir.graph import Graph, type_of
from paretorch.ir.ops import op_of
from paretorch.ir.types import DTYPE_NAMES

_HASHES: Any = WeakTensorKeyDictionary()  # by identity: tensors have no truth value to compare by


def print_graph(graph: Graph, *, hashes: bool = True) -> str:
    """The text. hashes: end const lines with the first 12 hex digits of the tensor's sha256."""
    return "\n".join(_Printer(graph).lines(hashes)) + "\n"


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


class _Printer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: dict[Node, str] = {}
        self.symbols: dict[str, str] = {}
        number = 0
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.names[node] = str(node.target)
            elif node.op == "call_function":
                self.names[node] = f"v{number}"
                number += 1

    def lines(self, hashes: bool) -> list[str]:
        inputs = ", ".join(f"{self.names[node]}: {self.type(node)}" for node in self.graph.inputs)
        outputs = ", ".join(self.value(value) for value in self.graph.outputs)
        head = f"graph {self.graph.name}({inputs}) -> {outputs}"
        constants, body, seen = [], [], set()
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(node.target)
                mark = f" # {tensor_hash(self.graph.constants[str(node.target)])[:12]}" if hashes else ""
                users = [order[user] for user in node.users]
                constants.append((min(users, default=0), str(node.target), f"const {node.target} : {self.type(node)}{mark}"))
            elif node.op == "call_function":
                body.append(self.line(node))
        return [head, *(line for *_, line in sorted(constants)), *body]

    def line(self, node: Node) -> str:
        return f"{self.names[node]} = {op_name(node)}({', '.join(self.arguments(node))}) : {self.type(node)}"

    def type(self, node: Node) -> str:
        return self.rename(str(type_of(node)))

    def rename(self, text: str) -> str:
        """Symbols by first use."""
        return re.sub(r"\b[a-z]+\d+\b(?=[^\[]|$)", self._symbol, text) if self._has_symbols(text) else text

    def _has_symbols(self, text: str) -> bool:
        inner = re.search(r"\[(.*)\]", text)
        return inner is not None and re.search(r"[a-z]", inner[1]) is not None

    def _symbol(self, match: re.Match[str]) -> str:
        name = match[0]
        if name in DTYPE_NAMES.values():
            return name
        return self.symbols.setdefault(name, f"s{len(self.symbols)}")

    def arguments(self, node: Node) -> list[str]:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return [self.value(arg) for arg in node.args]
        positional, named = [], {}
        for i, parameter in enumerate(schema.arguments):
            given = i < len(node.args) or parameter.name in node.kwargs
            value = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)
            if parameter.name in ("device", "layout", "pin_memory") or not given or (value is None and parameter.default_value is None and parameter.has_default_value()):
                continue
            if _holds_node(value) and len(positional) == i and not parameter.kwarg_only:
                positional.append(self.value(value))
            elif not (parameter.has_default_value() and _equal(value, parameter.default_value)):
                named[parameter.name] = self.value(value)
        return [*positional, *(f"{name}={named[name]}" for name in sorted(named))]

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return DTYPE_NAMES[value]
        if isinstance(value, (torch.SymInt, sympy.Expr)):
            return self.rename(str(value))
        if isinstance(value, (torch.device, torch.layout, torch.memory_format, slice)):
            return f"'{value}'"
        return repr(value)


def op_name(node: Node) -> str:
    """The row's name for its first overload, row.overload for another of its overloads, namespace::op.overload without a row."""
    op, target = op_of(node), node.target
    if op is None:
        return f"{target._schema.name}.{target._overloadname}" if hasattr(target, "_schema") else f"python::{getattr(target, '__name__', target)}"
    if target is op.targets[0] or getattr(target, "__module__", "") == operator.__name__:
        return op.name
    packet, overload = target._schema.name.split("::")[-1], target._overloadname
    return f"{op.name}:{packet}.{overload}"


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(isinstance(item, Node) for item in value))


def _equal(value: Any, default: Any) -> bool:
    return not _holds_node(value) and type(value) is type(default) and bool(value == default)
