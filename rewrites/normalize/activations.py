"""Raise activations from their spellings: gelu (erf and tanh), silu, hardswish.

erf gelu:  x * 0.5 * (1 + erf(x / sqrt(2)))      tanh gelu: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))      silu: x * sigmoid(x)
hardswish: x * clamp(x + 3, 0, 6) / 6

A product of factors is read as a set, so the order and the place of the half do not matter.
"""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op

TOLERANCE = 1e-6  # of the constants, which models write with few digits


def activations(graph: Graph) -> Graph:
    """The same function with activations as one node each."""
    graph = graph.copy()
    for node in reversed(graph.calls):
        if is_op(node, "mul", "div") and node.users:
            _try(graph, node)
    return graph.clean()


def _try(graph: Graph, node: Node) -> None:
    number, factors = product(node)
    if len(factors) != 2:
        return
    b = Builder(graph, node, origin=origin_of(node))
    for x, gate in (tuple(factors), tuple(reversed(factors))):
        made = None
        if _near(number, 1 / 6) and _is_hard_gate(gate, x):
            made = b.hardswish(x)
        elif is_op(gate, "sigmoid") and gate.args[0] is x and number == 1:
            made = b.silu(x)
        elif _near(number, 0.5) and is_op(gate, "add") and gate.args[1] == 1:
            inner = gate.args[0]
            if is_op(inner, "erf") and _is_scaled(inner.args[0], x, 1 / math.sqrt(2)):
                made = b.gelu(x)
            elif is_op(inner, "tanh") and _is_cubic(inner.args[0], x):
                made = b.gelu(x, approximate="tanh")
        if made is not None and tensor_type(made) == tensor_type(node):
            graph.replace(node, made)
            return


def product(node: Any, only: Node | None = None) -> tuple[float, list[Any]]:
    """(number, factors) of a chain of mul by values and mul or div by numbers; inner products are opened if used only here."""
    if not isinstance(node, Node) or not is_op(node, "mul", "div") or (only is not None and len(node.users) != 1):
        return (float(node), []) if isinstance(node, (int, float)) else (1.0, [node])
    left, right = node.args[0], node.args[1]
    if is_op(node, "div"):
        if not isinstance(right, (int, float)):
            return 1.0, [node]
        number, factors = product(left, node)
        return number / right, factors
    a, b = product(left, node), product(right, node)
    return a[0] * b[0], [*a[1], *b[1]]


def _is_hard_gate(gate: Any, x: Any) -> bool:
    """clamp(x + 3, 0, 6)."""
    if not is_op(gate, "clamp", "hardtanh"):
        return False
    bound = arguments(gate)
    limits = (bound.get("min", bound.get("min_val")), bound.get("max", bound.get("max_val")))
    shifted = gate.args[0]
    return limits == (0, 6) and is_op(shifted, "add") and shifted.args[0] is x and shifted.args[1] == 3


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * abs(b)


def _is_scaled(value: Any, x: Any, scale: float) -> bool:
    number, factors = product(value)
    return len(factors) == 1 and factors[0] is x and _near(number, scale)


def _is_cubic(value: Any, x: Any) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x^3)."""
    number, factors = product(value)
    if len(factors) != 1 or not _near(number, math.sqrt(2 / math.pi)) or not is_op(factors[0], "add"):
        return False
    return any(a is x and _is_cube(b, x) for a, b in (factors[0].args[:2], factors[0].args[1::-1]))


def _is_cube(value: Any, x: Any) -> bool:
    number, factors = product(value)
    if not _near(number, 0.044715):
        return False
    if len(factors) == 1:
        return is_op(factors[0], "pow") and factors[0].args[0] is x and factors[0].args[1] == 3
    return len(factors) == 3 and all(factor is x for factor in factors)
