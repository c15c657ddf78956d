"""One spelling for re-describing: `permute` for every transpose, `reshape` for every view, chains merged, one symbolic size written as -1."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op


def views(graph: Graph) -> Graph:
    """The same function with canonical views."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "transpose", "permute"):
            _permute(graph, node)
        elif is_op(node, "view", "unsqueeze", "squeeze"):
            _view(graph, node)
    return graph.clean()


def order_of(node: Node) -> list[int]:
    """The permutation of a transpose or permute node."""
    rank, bound = len(node.meta["val"].shape), arguments(node)
    if is_op(node, "permute"):
        return [d % rank for d in bound["dims"]]
    order = list(range(rank))
    if rank > 1:
        first, second = (bound.get("dim0", 0) % rank, bound.get("dim1", 1) % rank)
        order[first], order[second] = order[second], order[first]
    return order


def _permute(graph: Graph, node: Node) -> None:
    order = order_of(node)
    source: Any = node.args[0]
    while isinstance(source, Node) and is_op(source, "transpose", "permute"):
        inner = order_of(source)
        order, source = [inner[d] for d in order], source.args[0]
    if order == list(range(len(order))):
        node.replace_all_uses_with(source)
    elif not (is_op(node, "permute") and source is node.args[0] and list(arguments(node)["dims"]) == order):
        made = Builder(graph, node, origin=origin_of(node)).permute(source, order)
        graph.replace(node, made)


def _view(graph: Graph, node: Node) -> None:
    """view, reshape, flatten, unflatten, unsqueeze and squeeze as one reshape of the first value in the chain."""
    if is_op(node, "squeeze", "unsqueeze") and not isinstance(node.meta["val"], torch.Tensor):
        return
    source: Any = node.args[0]
    while is_op(source, "view") or (is_op(source, "squeeze", "unsqueeze") and is_op(node, "view")):
        source = source.args[0]
    sizes = sizes_of(node)
    if sizes is None or tensor_type(source) == tensor_type(node):
        if sizes is not None:
            node.replace_all_uses_with(source)
        return
    if is_op(node, "squeeze", "unsqueeze") and not is_op(node.args[0], "view"):
        return
    if node.target is aten("reshape.default") and node.args[0] is source and list(arguments(node)["shape"]) == sizes:
        return
    made = Builder(graph, node, origin=origin_of(node)).call(aten("reshape.default"), (source, sizes))
    if tensor_type(made) == tensor_type(node):
        graph.replace(node, made)


def sizes_of(node: Node) -> list[int] | None:
    """The node's sizes with one symbolic size as -1; None if several are symbolic, or one beside a size of 0."""
    sizes = [int(size) if isinstance(size, int) else -1 for size in tensor_type(node).shape]
    return sizes if sizes.count(-1) <= 1 and (0 not in sizes or -1 not in sizes) else None
