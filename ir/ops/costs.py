"""The formulas that rows of the op table share: flops and bytes of a node, as ints or sympy expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.types import TensorType, TupleType, Type, from_fake


def value_type(node: Node) -> Type:
    return from_fake(node.meta["val"])


def tensors(found: Type) -> list[TensorType]:
    """The tensor types inside a type."""
    if isinstance(found, TensorType):
        return [found]
    if isinstance(found, TupleType):
        return [inner for part in found.items for inner in tensors(part)]
    return []


def operands(node: Node) -> list[TensorType]:
    """The types of the tensors that this node reads, each once."""
    return [type_ for argument in node.all_input_nodes for type_ in tensors(value_type(argument))]


def output(node: Node) -> TensorType:
    """The type of the node's first tensor output."""
    return tensors(value_type(node))[0]


def zero(node: Node) -> int:
    return 0


def per_element(count: int) -> Callable[[Node], Any]:
    """So many operations for each element of the output."""
    return lambda node: count * output(node).numel


def per_input_element(count: int) -> Callable[[Node], Any]:
    """So many operations for each element of the first operand."""
    return lambda node: count * operands(node)[0].numel


def per_element_and_affine(count: int) -> Callable[[Node], Any]:
    """So many operations for each element of the output, and one more each for a `weight` and for a `bias`."""

    def flops(node: Node) -> Any:
        given = arguments(node)
        return (count + sum(given.get(name) is not None for name in ("weight", "bias"))) * output(node).numel

    return flops


def type_of_argument(node: Node, name: str) -> TensorType:
    """The type of the tensor that a call is given under that name of its schema."""
    return tensors(value_type(arguments(node)[name]))[0]


def inputs_and_output(node: Node) -> Any:
    """Each operand read once, each output written once."""
    return sum(t.nbytes for t in operands(node)) + sum(t.nbytes for t in tensors(value_type(node)))


def output_twice(node: Node) -> Any:
    """What is written is also what is read: gathers, slices that copy."""
    return 2 * sum(t.nbytes for t in tensors(value_type(node)))


def output_only(node: Node) -> Any:
    return sum(t.nbytes for t in tensors(value_type(node)))
