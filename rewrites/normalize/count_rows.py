"""Rows packed so that the real ones come first, as their numbers, for attention that can leave out the keys behind them.

attention(q, k, v, key_bias = log_size(size))   ->   attention(q, k, v, key_bias, lengths = the place behind the last row with size above 0)

Exact where a sample has any real row: keys of size 0 have no weight before and after. Like counted keys this is a form for a runtime whose kernel
reads lengths; it is taken for the sizes that `merge_ragged` gives, of which the real ones are first, and says nothing of rows after a later step.
Source: Wang et al. 2025, arXiv:2504.17040; NVIDIA FasterTransformer's `sequence_lengths`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of
from paretorch.ir.ops import aten, is_op


def count_rows(graph: Graph) -> Graph:
    """The graph with lengths where keys are packed rows; the same object where none are."""
    if not any(_packed(node) for node in graph.calls):
        return graph
    graph, lengths = graph.copy(), dict[Node, Node]()
    for node in graph.calls:
        size = _packed(node)
        if size is not None:
            if size not in lengths:
                lengths[size] = _lengths(graph, size)
            node.kwargs = {**node.kwargs, "lengths": lengths[size]}
    return graph


def _packed(node: Node) -> Node | None:
    """The sizes of an attention's keys if they are packed rows and not counted yet."""
    given = arguments(node) if is_op(node, "attention") else {}
    bias: Any = given.get("key_bias")
    if bias is None or given["lengths"] is not None or not is_op(bias, "log_size"):
        return None
    size = bias.args[0]
    return size if size.target is operator.getitem and is_op(size.args[0], "merge_ragged") else None


def _lengths(graph: Graph, size: Node) -> Node:
    """i64[B,1]: the place behind the last row of a size above 0; size: T[B,T]."""
    b = Builder(graph, size.next, origin=origin_of(size))
    behind = b.constant("places_behind", torch.arange(1, int(shape_of(size)[1]) + 1))
    real = b.call(aten("_to_copy.default"), (b.call(aten("gt.Scalar"), (size, 0.0)),), {"dtype": torch.int64})
    return b.amax(b.mul(real, behind), [1], True)
