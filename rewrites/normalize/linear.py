"""One spelling for products with a constant weight: `linear`, also for addmm, mm, matmul and for weights stored [in, out]."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op


def linear(graph: Graph) -> Graph:
    """The same function with `linear` wherever the right operand is a constant matrix."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "addmm", "mm", "matmul"):
            _to_linear(graph, node)
        elif is_op(node, "view"):
            _around_linear(graph, node)
    return graph.clean()


def _to_linear(graph: Graph, node: Node) -> None:
    bound = arguments(node)
    if is_op(node, "addmm"):
        if node.target is not aten("addmm.default") or bound["beta"] != 1 or bound["alpha"] != 1:
            return
        bias, x, weight = bound["self"], bound["mat1"], bound["mat2"]
    else:
        bias, x, weight = None, node.args[0], node.args[1]
    matrix = graph.constant(weight)
    if matrix is None or matrix.ndim != 2 or not isinstance(x, Node) or tensor_type(x).rank < 2:
        return
    vector = graph.constant(bias) if bias is not None else None
    if bias is not None and (vector is None or vector.shape != matrix.shape[1:]):
        return
    b = Builder(graph, node, origin=origin_of(node))
    turned = b.constant(f"{weight.target}_transposed", transposed(matrix))
    graph.replace(node, b.linear(x, turned, *([bias] if bias is not None else [])))


def _around_linear(graph: Graph, node: Node) -> None:
    """reshape(linear(reshape(x))) that only flattens and restores leading axes -> linear(x)."""
    inner: Any = node.args[0]
    if not is_op(inner, "linear") or len(inner.users) != 1 or not is_op(inner.args[0], "view"):
        return
    x = inner.args[0].args[0]
    before: tuple[Any, ...] = tensor_type(x).shape
    after: tuple[Any, ...] = tensor_type(node).shape
    if len(before) == len(after) and before[:-1] == after[:-1] and before[-1] == tensor_type(inner.args[0]).shape[-1]:
        made = Builder(graph, node, origin=origin_of(inner)).linear(x, *inner.args[1:])
        if tensor_type(made) == tensor_type(node):
            graph.replace(node, made)


def transposed(matrix: Tensor) -> Tensor:
    """The contiguous transpose; a view of a contiguous matrix gives that matrix back."""
    return matrix.t().contiguous()
