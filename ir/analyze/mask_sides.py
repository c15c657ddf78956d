"""Whether a mask that is computed may hide later keys from earlier queries: what it hides must depend on the key alone, or on the query alone.

Read from the mask back: sums and choices of masks, down to tables of numbers by place that hide nothing, scores that are products of the tokens
themselves, and conditions that each look at keys only or at queries only. All else may hide anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, shape_of, tensor_type
from paretorch.ir.ops import is_op, op_of

LAID_OUT = ("to", "view", "unsqueeze", "squeeze", "expand", "clone", "alias")
LOOKED_UP = ("permute", "transpose", "slice", "select", "split", "gather", "index", "index_select", "pad")
TAKEN = (*LAID_OUT, *LOOKED_UP, "add", "sub", "mul", "div")
HIDING = -1e3  # what is added to a score that no other can make up for


def may_hide_later(graph: Graph, mask: Any) -> bool:
    """Whether a mask, bool or added to scores, [..., Tq, Tk], may hide a later key from a query that sees an earlier one, by their places."""
    return not (_is_condition(graph, mask) if tensor_type(mask).dtype == "bool" else _is_score(graph, mask))


def _one_sided(node: Node) -> bool:
    """Whether a value says nothing of pairs."""
    return 1 in ([1, 1, *shape_of(node)])[-2:]


def _is_score(graph: Graph, node: Any) -> bool:
    """Whether a value added to scores hides nothing, or keys or queries only."""
    if not isinstance(node, Node) or _one_sided(node):
        return True
    tensor = graph.known(node)
    if tensor is not None:
        return not bool((tensor < HIDING).any())
    given = arguments(node) if node.op == "call_function" else {}
    if is_op(node, "add", *LAID_OUT):
        return all(_is_score(graph, operand) for operand in node.all_input_nodes)
    if is_op(node, "where"):
        parts = (value for name, value in given.items() if name != "condition")
        return _is_condition(graph, given["condition"]) and all(_is_score(graph, part) for part in parts)
    return _is_of_tokens(graph, node)


def _is_condition(graph: Graph, node: Any) -> bool:
    """Whether a truth value, or a number that stands for one, looks at keys and at queries apart."""
    if not isinstance(node, Node) or _one_sided(node):
        return True
    tensor = graph.known(node)
    if tensor is not None:
        return _is_constant_along(tensor, -2) or _is_constant_along(tensor, -1)
    kept = is_op(node, "logical_and", "logical_or", "mul", *LAID_OUT)
    return kept and all(_is_condition(graph, operand) for operand in node.all_input_nodes)


def _is_constant_along(tensor: Tensor, dim: int) -> bool:
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def _is_of_tokens(graph: Graph, node: Node) -> bool:
    """Whether a value is looked up in, or made of, products, times tables and numbers: a score, which hides nothing."""
    todo, products, seen = [node], 0, set[Node]()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        op = op_of(current) if current.op == "call_function" else None
        if op is not None and op.kind == "matrix":
            products += 1
        elif is_op(current, *TAKEN):
            numbers = (argument for argument in current.all_input_nodes if tensor_type(argument).dtype.startswith(("f", "bf")))
            todo += numbers
        elif not _is_table(graph, current):
            return False
    return products > 0


def _is_table(graph: Graph, node: Node) -> bool:
    """Whether a value is a constant of many numbers, none of which hides; one of two numbers may choose what is hidden."""
    tensor = graph.known(node)
    if tensor is None or bool((tensor < HIDING).any()):
        return False
    return tensor.numel() == 1 or len(tensor.unique()) > 2
