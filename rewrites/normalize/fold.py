"""Fold what depends on constants only: masks from arange, slices of position tables, transposed weights. And merge equal computations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, has_values, origin_of
from paretorch.ir.ops import is_op, op_of

LARGEST = 1 << 24  # elements of a folded result that has more than its operands
RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal", "uniform", "poisson", "exponential", "empty")


def fold(graph: Graph) -> Graph:
    """The same function with constant subgraphs as constants. Results larger than their operands and than LARGEST stay computed."""
    graph = graph.copy()
    values = _values(graph)
    made: dict[Any, list[Node]] = {}
    written: dict[int, Node] = {}  # by the tensor
    for node in graph.calls:
        kept = [user for user in node.users if user not in values]
        if node in values and isinstance(values[node], Tensor) and kept:
            key = id(values[node])
            if key not in written:
                written[key] = _constant(graph, node, _own(values[node]), made)
            constant = written[key]
            returned = [user for user in kept if user.op == "output"]
            if returned:  # the caller may write into what it is given
                copy = Builder(graph, node, origin=origin_of(node)).clone(constant)
                for user in returned:
                    user.replace_input_with(node, copy)
            graph.replace(node, constant)
    return graph.clean()


def _values(graph: Graph) -> dict[Node, Any]:
    """What each node makes that depends on constants only; equal calls on the same tensors make the same tensor."""
    values: dict[Node, Any] = {node: graph.constants[str(node.target)] for node in graph.nodes if node.op == "get_attr"}
    known: dict[str, Any] = {}
    for node in graph.calls:
        if not _is_foldable(node, values):
            continue
        given = (node.args, dict(node.kwargs))
        call = repr((node.target, torch.fx.node.map_arg(given, lambda n: f"value {id(values[n])}")))
        if call in known:
            values[node] = known[call]
            continue
        args, kwargs = torch.fx.node.map_arg(given, lambda n: values[n])
        with torch.no_grad():
            result = _call(node.target, args, kwargs)
        if _is_small(result, args):
            values[node] = known[call] = result
    return values


def _constant(graph: Graph, node: Node, tensor: Tensor, made: dict[Any, list[Node]]) -> Node:
    """A node for the tensor; equal ones are shared. made: those of earlier calls, by dtype, shape and a sample of their elements."""
    alike = made.setdefault((tensor.dtype, tensor.device, tuple(tensor.shape), _sample(tensor)), [])
    for earlier in alike:
        held = graph.constants[str(earlier.target)]
        if held is tensor or torch.equal(held, tensor):
            return earlier
    alike.append(Builder(graph, _first_place(graph), origin=origin_of(node)).constant(f"folded.{node.name}", tensor))
    return alike[-1]


def _sample(tensor: Tensor) -> str:
    """Some elements; where there are no values, which tensor it is."""
    if not has_values(tensor):
        return f"tensor {id(tensor)}"
    places = torch.linspace(0, max(tensor.numel() - 1, 0), min(tensor.numel(), 16)).long()
    return repr(tensor.take(places.to(tensor.device)).tolist() if tensor.numel() else [])


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _first_place(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _is_foldable(node: Node, values: dict[Node, Any]) -> bool:
    if any(argument not in values for argument in node.all_input_nodes) or _is_returned_copy(node):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and (schema.is_mutable or any(word in schema.name for word in RANDOM)):
        return False
    fake = node.meta.get("val")
    sizes = getattr(fake, "shape", ())
    return all(isinstance(size, int) for size in sizes) and not isinstance(fake, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_returned_copy(node: Node) -> bool:
    """Whether this copies a constant for the model's caller."""
    return is_op(node, "clone") and node.args[0].op == "get_attr" and all(user.op == "output" for user in node.users)  # type: ignore[union-attr]


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
    for node in graph.nodes:
        op = op_of(node)
        schema = getattr(node.target, "_schema", None)
        if node.op == "get_attr":
            key: Any = ("get_attr", node.target)
        elif op is None or (schema is not None and (schema.is_mutable or any(word in schema.name for word in RANDOM))):
            continue
        else:
            key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        try:
            first = seen.setdefault(key, node)
        except TypeError:  # an argument that cannot be hashed
            continue
        if first is not node and not _is_returned_copy(node):
            node.replace_all_uses_with(first)
    return graph.clean()


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, (bool, int, float)):
        return (type(value).__name__, repr(value))
    return value
