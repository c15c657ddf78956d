"""Fold what depends on constants only: masks from arange, slices of position tables, transposed weights. And merge equal computations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, origin_of
from paretorch.ir.ops import op_of

LARGEST = 1 << 24  # elements of a folded result that has more than its operands
RANDOM = ("rand", "randn", "bernoulli", "dropout", "multinomial", "normal", "uniform", "randint", "randperm", "empty")


def fold(graph: Graph) -> Graph:
    """The same function with constant subgraphs as constants. Results larger than their operands and than LARGEST stay computed."""
    graph = graph.copy()
    values: dict[Node, Any] = {node: graph.constants[str(node.target)] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.calls:
        if not _is_foldable(node, values):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        with torch.no_grad():
            result = call(node.target, args, kwargs)
        if _is_small(result, args):
            values[node] = result
    for node in graph.calls:
        kept = [user for user in node.users if user not in values]
        if node in values and isinstance(values[node], Tensor) and kept:
            made = Builder(graph, node, origin=origin_of(node)).constant(f"folded.{node.name}", _own(values[node]))
            graph.replace(node, made)
    return graph.clean()


def call(target: Any, args: Any, kwargs: Any) -> Any:
    """An op on real tensors."""
    return target(*args, **kwargs)


def _is_foldable(node: Node, values: dict[Node, Any]) -> bool:
    if any(argument not in values for argument in node.all_input_nodes):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and (schema.is_mutable or any(word in schema.name for word in RANDOM)):
        return False
    fake = node.meta.get("val")
    sizes = getattr(fake, "shape", ())
    return all(isinstance(size, int) for size in sizes) and not isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_small(result: Any, args: Any) -> bool:
    if not isinstance(result, Tensor):
        return True
    given = sum(x.numel() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor))
    return result.numel() <= max(LARGEST, given)


def _own(tensor: Tensor) -> Tensor:
    """Expanded results keep their small storage; everything else is contiguous."""
    return tensor if 0 in tensor.stride() else tensor.contiguous()


def merge_equal(graph: Graph) -> Graph:
    """The same function where equal calls on equal operands are computed once."""
    graph = graph.copy()
    seen: dict[Any, Node] = {}
    for node in graph.calls:
        op = op_of(node)
        schema = getattr(node.target, "_schema", None)
        if op is None or (schema is not None and (schema.is_mutable or any(word in schema.name for word in RANDOM))):
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # an argument that cannot be hashed
            continue
        if first is not node:
            node.replace_all_uses_with(first)
    return graph.clean()


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, (bool, int, float)):
        return (type(value).__name__, value)
    return value
