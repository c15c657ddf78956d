"""One spelling for arithmetic: `.Tensor` overloads with a plain number as second operand, subtraction and division in their direct form,
integer powers of two as products with themselves kept as `pow`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op, row

BINARY = ("add", "sub", "mul", "div")


def scalars(graph: Graph) -> Graph:
    """The same function with every scalar operand a Python number on the right."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "pow"):
            _pow(graph, node)
        elif is_op(node, *BINARY, "rsub"):
            made = _rewritten(graph, node)
            if made is not None and tensor_type(made) == tensor_type(node):
                graph.replace(node, made)
    return graph.clean()


def _rewritten(graph: Graph, node: Node) -> Node | None:
    b = Builder(graph, node, origin=origin_of(node))
    bound = arguments(node)
    left, right = bound.get("self"), bound.get("other")
    alpha = bound.get("alpha", 1)
    left, right = _plain(graph, left), _plain(graph, right)
    if is_op(node, "rsub"):
        return b.add(b.mul(left, -1), right) if isinstance(right, (int, float)) and alpha == 1 else None
    if alpha != 1 and isinstance(alpha, (int, float)):
        right = right * alpha if isinstance(right, (int, float)) else b.mul(right, alpha)
    name = next(name for name in BINARY if is_op(node, name))
    if not isinstance(left, Node):
        if name not in ("add", "mul") or not isinstance(right, Node):
            return None
        left, right = right, left
    if node.target is row(name).targets[0] and node.args == (left, right) and not node.kwargs:
        return None
    return b.call(aten(f"{name}.Tensor"), (left, right))


def _pow(graph: Graph, node: Node) -> None:
    """A power whose exponent is a constant of one element takes the number; whole exponents as ints."""
    exponent = _plain(graph, node.args[1])
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    if isinstance(node.args[0], Node) and isinstance(exponent, (int, float)) and exponent is not node.args[1]:
        made = Builder(graph, node, origin=origin_of(node)).call(aten("pow.Tensor_Scalar"), (node.args[0], exponent))
        if tensor_type(made) == tensor_type(node):
            graph.replace(node, made)


def _plain(graph: Graph, value: Any) -> Any:
    """A constant of one element as its number, where that keeps the meaning: floating point only, and the caller compares types."""
    tensor = graph.known(value)
    if tensor is not None and tensor.numel() == 1 and tensor.dtype in (torch.float32, torch.float64):
        return float(tensor)
    return value
