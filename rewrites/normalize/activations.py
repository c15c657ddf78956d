"""Raise activations from their spellings: gelu (erf and tanh), silu, sigmoid, hardswish.

erf gelu:  x * 0.5 * (1 + erf(x / sqrt(2)))      tanh gelu: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
silu: x * sigmoid(x), x / (1 + exp(-x))          hardswish: x * clamp(x + 3, 0, 6) / 6

A product of factors is read as a set, so the order and the place of the half do not matter. x * sigmoid(1.702 * x) and other gates with a slope
of their own stay products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op

SLOPE = math.sqrt(2 / math.pi)

# How far a constant of the spelling may be from the exact one, relative: what rounding the same formula in that dtype would make.
TOLERANCE = {torch.float64: 1e-12}
TOLERANCE_BELOW = 1e-7

Near = Callable[[float, float], bool]


def activations(graph: Graph) -> Graph:
    """The same function with activations as one node each."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "reciprocal") and _exponential(node.args[0]) is not None:
            _put(graph, node, "sigmoid", _exponential(node.args[0]))
    for node in reversed(graph.calls):
        if is_op(node, "mul", "div") and node.users:
            _try(graph, node)
    return graph.clean()


def _try(graph: Graph, node: Node) -> None:
    if is_op(node, "div") and isinstance(node.args[0], Node) and _exponential(node.args[1]) is node.args[0]:
        _put(graph, node, "silu", node.args[0])
        return
    number, factors = product(node)
    if len(factors) != 2:
        return
    limit = TOLERANCE.get(node.meta["val"].dtype, TOLERANCE_BELOW)

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= limit * abs(b)

    for x, gate in (tuple(factors), tuple(reversed(factors))):
        name, options = _gated(number, x, gate, near)
        if name:
            _put(graph, node, name, x, **options)
            return


def _put(graph: Graph, node: Node, name: str, x: Node, **options: str) -> None:
    made = getattr(Builder(graph, node, origin=origin_of(node)), name)(x, **options)
    if tensor_type(made) == tensor_type(node):
        graph.replace(node, made)


def _gated(number: float, x: Any, gate: Any, near: Near) -> tuple[str, dict[str, str]]:
    """The activation that number * x * gate is, with its options; ("", {}) if none."""
    if is_op(gate, "sigmoid") and near(number, 1):
        if gate.args[0] is x:
            return "silu", {}
        return ("gelu", {"approximate": "tanh"}) if _is_cubic(gate.args[0], x, 2 * SLOPE, near) else ("", {})
    if (is_op(gate, "hardsigmoid") and gate.args[0] is x and near(number, 1)) or (near(number, 1 / 6) and _is_hard_gate(gate, x)):
        return "hardswish", {}
    if not is_op(gate, "add") or not isinstance(gate.args[1], (int, float)) or not near(number * gate.args[1], 0.5):
        return "", {}
    scale, inner = product(gate.args[0])
    if len(inner) != 1 or not near(scale, gate.args[1]):
        return "", {}
    if is_op(inner[0], "erf") and _is_scaled(inner[0].args[0], x, 1 / math.sqrt(2), near):
        return "gelu", {}
    if is_op(inner[0], "tanh") and _is_cubic(inner[0].args[0], x, SLOPE, near):
        return "gelu", {"approximate": "tanh"}
    return "", {}


def product(node: Any, only: Node | None = None) -> tuple[float, list[Any]]:
    """(number, factors) of a chain of mul by values and mul or div by numbers; inner products are opened if used only here."""
    if not isinstance(node, Node) or not is_op(node, "mul", "div") or (only is not None and len(node.users) != 1):
        return (float(node), []) if isinstance(node, (int, float)) else (1.0, [node])
    left, right = node.args[0], node.args[1]
    if is_op(node, "div"):
        if not isinstance(right, (int, float)) or right == 0:
            return 1.0, [node]
        number, factors = product(left, node)
        return number / right, factors
    a, b = product(left, node), product(right, node)
    return a[0] * b[0], [*a[1], *b[1]]


def _exponential(value: Any) -> Any:
    """x where this is 1 + exp(-x)."""
    if not is_op(value, "add") or value.args[1] != 1 or not is_op(value.args[0], "exp"):
        return None
    inner = value.args[0].args[0]
    if is_op(inner, "neg"):
        return inner.args[0]
    return inner.args[0] if is_op(inner, "mul", "div") and inner.args[1] == -1 else None


def _is_hard_gate(gate: Any, x: Any) -> bool:
    """clamp(x + 3, 0, 6)."""
    if not is_op(gate, "clamp", "hardtanh"):
        return False
    bound = arguments(gate)
    limits = (bound.get("min", bound.get("min_val")), bound.get("max", bound.get("max_val")))
    shifted = gate.args[0]
    return limits == (0, 6) and is_op(shifted, "add") and shifted.args[0] is x and shifted.args[1] == 3


def _is_scaled(value: Any, x: Any, scale: float, near: Near) -> bool:
    number, factors = product(value)
    return len(factors) == 1 and factors[0] is x and near(number, scale)


def _is_cubic(value: Any, x: Any, slope: float, near: Near) -> bool:
    """slope * (x + 0.044715 * x^3)  or  slope * x * (1 + 0.044715 * x^2)."""
    number, factors = product(value)
    if not near(number, slope):
        return False
    if len(factors) == 1 and is_op(factors[0], "add"):
        return any(a is x and _is_power(b, x, 3, near) for a, b in (factors[0].args[:2], factors[0].args[1::-1]))
    gates = [factor for factor in factors if factor is not x]
    if len(factors) != 2 or len(gates) != 1 or not is_op(gates[0], "add"):
        return False
    return gates[0].args[1] == 1 and _is_power(gates[0].args[0], x, 2, near)


def _is_power(value: Any, x: Any, power: int, near: Near) -> bool:
    """0.044715 * x^power, the power spelled in any way."""
    number, factors = product(value)
    total = 0.0
    for factor in factors:
        is_power = is_op(factor, "pow") and isinstance(factor.args[1], (int, float))
        base, exponent = (factor.args[0], factor.args[1]) if is_power else (factor, 1)
        if base is x:
            total += exponent
        elif is_op(base, "mul") and base.args[0] is x and base.args[1] is x:  # a square that is used elsewhere too
            total += 2 * exponent
        else:
            return False
    return near(number, 0.044715) and total == power
