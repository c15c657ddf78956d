"""A softmax whose weights are multiplied by numbers and divided by their sum again, as the softmax of scores to which their logarithms are added.

    p = softmax(s) * w;  p / sum(p)   ->   softmax(s + log(w))

and the same for exp(s) instead of softmax(s). Models whose tokens are hidden by a policy of zeros and ones write it so; behind this pass it is
a mask like any other. Exact over the reals where w is never negative, which must be seen from how it is computed, and where some weight is left.
Source: Rao et al. 2021, arXiv:2106.02034, equation 10 without its epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op, op_of
from paretorch.ir.types import DTYPES

DEPTH = 32  # how far back a sign is followed


def weighted_softmax(graph: Graph) -> Graph:
    """The same function with one softmax for each that is weighted."""
    graph = graph.copy()
    for node in graph.calls:
        found = _weighted(graph, node)
        if found is not None:
            weights, factor, dim = found
            b = Builder(graph, node, origin=origin_of(node))
            logarithm = b.call(aten("log.default"), (factor,))
            scores = arguments(weights)["self"]
            graph.replace(node, b.call(aten("softmax.int"), (b.add(scores, logarithm), dim)))
    return graph.clean()


def _weighted(graph: Graph, node: Node) -> tuple[Node, Node, int] | None:
    """(softmax or exp, factor, dimension) of a quotient of weighted weights and their sum."""
    if not is_op(node, "div") or len(node.args) != 2 or not all(isinstance(part, Node) for part in node.args):
        return None
    product, total = node.args
    if not is_op(product, "mul") or not is_op(total, "sum") or total.args[0] is not product:  # type: ignore[union-attr]
        return None
    given, rank = arguments(total), len(shape_of(product))  # type: ignore[arg-type]
    dims = given.get("dim")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not given.get("keepdim"):
        return None
    for weights, factor in (product.args, product.args[::-1]):  # type: ignore[union-attr]
        fits = isinstance(weights, Node) and isinstance(factor, Node) and shape_of(weights) == shape_of(product)  # type: ignore[arg-type]
        if fits and _is_softmax(weights, dims[0] % rank) and is_never_negative(graph, factor):
            same = tensor_type(factor).dtype == tensor_type(weights).dtype  # type: ignore[arg-type]
            return (weights, factor, dims[0]) if same else None  # type: ignore[return-value]
    return None


def _is_softmax(node: Any, dim: int) -> bool:
    given = arguments(node)
    if is_op(node, "softmax"):
        return given["dim"] % len(shape_of(node)) == dim and given.get("dtype") is None
    return is_op(node, "exp")


def is_never_negative(graph: Graph, node: Any, depth: int = DEPTH) -> bool:
    """Whether a value cannot be negative, as far as that follows from the ops that make it."""
    if isinstance(node, (int, float)):
        return node >= 0
    if not isinstance(node, Node) or depth == 0:
        return False
    known = graph.known(node)
    if known is not None:
        return bool((known >= 0).all())
    op = op_of(node)
    if DTYPES[tensor_type(node).dtype] == torch.bool or is_op(node, "sigmoid", "softmax", "exp", "relu", "abs"):
        return True
    if is_op(node, "ones", "zeros", "ones_like", "zeros_like") or "ones" in str(node.target) or "zeros" in str(node.target):
        return True
    if op is not None and (is_op(node, "mul", "to", "cat") or op.kind == "view"):
        parts = node.args[0] if is_op(node, "cat") else node.args if is_op(node, "mul") else node.args[:1]
        return all(is_never_negative(graph, part, depth - 1) for part in parts)  # type: ignore[union-attr]
    return False
