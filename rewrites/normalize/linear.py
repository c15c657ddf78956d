"""One spelling for products with a constant weight: `linear`, also for addmm, mm, bmm and matmul, and for weights stored [in, out]."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.rewrites.normalize.views import order_of


def linear(graph: Graph) -> Graph:
    """The same function with `linear` wherever the right operand is a constant matrix."""
    graph = graph.copy()
    turned: dict[Node, Node] = {}
    for node in graph.calls:
        if is_op(node, "addmm", "mm", "matmul", "bmm"):
            _to_linear(graph, node, turned)
        elif is_op(node, "view"):
            _around_linear(graph, node)
        elif is_op(node, "add"):
            _add_bias(graph, node)
    return graph.clean()


def _to_linear(graph: Graph, node: Node, turned: dict[Node, Node]) -> None:
    """turned: transposed weights that were made before, by the weight."""
    bound = arguments(node)
    if is_op(node, "addmm"):
        if node.target is not aten("addmm.default") or bound["beta"] != 1 or bound["alpha"] != 1:
            return
        bias, x, weight = bound["self"], bound["mat1"], bound["mat2"]
    else:
        bias, x, weight = None, node.args[0], node.args[1]
    if not isinstance(x, Node) or tensor_type(x).rank < 2 or not isinstance(weight, Node):
        return
    matrix = _matrix(graph, weight)
    if matrix is None:
        return
    vector = graph.constant(bias) if bias is not None else None
    if bias is not None and (vector is None or vector.shape != tensor_type(node).shape[-1:]):
        return
    b = Builder(graph, node, origin=origin_of(node))
    if weight.op != "get_attr":  # the transpose of a constant
        upright: Node = weight.args[0]  # type: ignore[assignment]
    else:
        if weight not in turned:
            turned[weight] = b.constant(f"{weight.target}_transposed", transposed(matrix))
        upright = turned[weight]
    made = b.linear(x, upright, *([bias] if bias is not None else []))
    if tensor_type(made) == tensor_type(node):
        graph.replace(node, made)


def _matrix(graph: Graph, weight: Node) -> Tensor | None:
    """The constant matrix [in, out] behind this node: itself, one of a batch of one, or the transpose of a constant [out, in]."""
    held = graph.constant(weight)
    if held is not None:
        while held.ndim > 2 and (held.shape[0] == 1 or held.stride(0) == 0):
            held = held[0]
        return held if held.ndim == 2 else None
    if is_op(weight, "permute", "transpose") and tensor_type(weight).rank == 2 and order_of(weight) == [1, 0]:
        held = graph.constant(weight.args[0])
        return held.t() if held is not None else None
    return None


def _add_bias(graph: Graph, node: Node) -> None:
    """linear(x, W) + constant of the last axis -> linear with a bias."""
    for product, other in (node.args[:2], node.args[1::-1]):
        vector = graph.constant(other)
        if vector is None or not is_op(product, "linear") or len(product.users) != 1 or node.kwargs:  # type: ignore[union-attr]
            continue
        given, type_ = arguments(product), tensor_type(product)  # type: ignore[arg-type]
        if given["bias"] is None and vector.shape == type_.shape[-1:] and vector.dtype == product.meta["val"].dtype:  # type: ignore[union-attr]
            made = Builder(graph, node, origin=origin_of(product)).linear(given["input"], given["weight"], other)  # type: ignore[arg-type]
            graph.replace(node, made)
            return


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
