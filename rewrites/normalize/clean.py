"""Remove what does nothing: copies, aliases, casts to the same dtype, expansions to the same shape, dropout in eval, additions of zero."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, tensor_type
from paretorch.ir.ops import aten, is_op

ASSERTIONS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")


def clean(graph: Graph) -> Graph:
    """The same function without useless nodes."""
    graph = graph.copy()
    for node in graph.calls:
        if node.target in (aten("view.default"), aten("_unsafe_view.default")):
            node.target = aten("reshape.default")  # a view of what was a copy need not be a view any more
        source = _same_as(node)
        if source is not None:
            node.replace_all_uses_with(source)
        elif _is_assertion(node):
            graph.fx.erase_node(node)
    return graph.clean()


def _is_assertion(node: Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
    return name in ASSERTIONS and not node.users


def _same_as(node: Node) -> Node | None:
    """The operand whose value this node returns; None if it computes something."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if is_op(node, "alias", "clone"):
        return source
    if is_op(node, "to", "expand", "view", "repeat", "slice", "permute"):
        return source if _keeps(node, source) else None
    if is_op(node, "add", "sub") and _number(node, 1) == 0 and _same_type(node, source):
        return source
    if is_op(node, "mul", "div") and _number(node, 1) == 1 and _same_type(node, source):
        return source
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return source if name == "aten::dropout" and not arguments(node)["train"] else None


def _same_type(node: Node, source: Node) -> bool:
    return tensor_type(node) == tensor_type(source)


def _keeps(node: Node, source: Node) -> bool:
    """Whether a cast or a re-description changes nothing."""
    if not _same_type(node, source):
        return False
    if is_op(node, "to"):
        return bool(node.meta["val"].device == source.meta["val"].device)
    if is_op(node, "permute"):
        dims = arguments(node)["dims"]
        return [d % len(dims) for d in dims] == list(range(len(dims)))
    return not is_op(node, "slice") or arguments(node).get("step", 1) == 1


def _number(node: Node, place: int) -> Any:
    value = node.args[place] if len(node.args) > place else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
