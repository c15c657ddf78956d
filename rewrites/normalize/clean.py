"""Remove what does nothing: copies, aliases, casts to the same dtype, expansions to the same shape, dropout in eval, additions of zero,
concatenations with nothing (a cache that is empty yet), assertions.

A copy of an input or a constant that the model returns stays: the caller may write into what it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op

ASSERTIONS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
NARROW = (torch.float16, torch.bfloat16)


def clean(graph: Graph) -> Graph:
    """The same function without useless nodes."""
    graph = graph.copy()
    for node in graph.calls:
        if node.target in (aten("view.default"), aten("_unsafe_view.default")):
            node.target = aten("reshape.default")  # a view of what was a copy need not be a view any more
        elif is_op(node, "to"):
            node = _plain_cast(graph, node)
        elif is_op(node, "cat"):
            _drop_empty(node)
        source = _same_as(node)
        if source is not None:
            graph.replace(node, source, but=_returns(node, source))
        elif name_of(node) in ASSERTIONS and not node.users:
            graph.fx.erase_node(node)
    return graph.clean()


def name_of(node: Node) -> str:
    """The op's name without its namespace and overload."""
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).split("::")[-1]


def _returns(node: Node, source: Node) -> list[Node]:
    """The output node, if it must not return `source` itself."""
    is_copy = is_op(node, "clone", "cat") and source.op in ("placeholder", "get_attr")
    return [user for user in node.users if user.op == "output"] if is_copy else []


def _plain_cast(graph: Graph, node: Node) -> Node:
    """Any cast as `_to_copy` with a dtype only, where the device stays."""
    made, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    if made.device != source.device or (node.target is aten("_to_copy.default") and set(node.kwargs) == {"dtype"}):
        return node
    plain = Builder(graph, node, origin=origin_of(node)).call(aten("_to_copy.default"), (node.args[0],), {"dtype": made.dtype})
    graph.replace(node, plain)
    return plain


def _same_as(node: Node) -> Node | None:
    """The operand whose value this node returns; None if it computes something."""
    source = node.args[0] if node.args else None
    if is_op(node, "cat") and len(source) == 1:  # type: ignore[arg-type]
        source = source[0]  # type: ignore[index]
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if is_op(node, "alias", "clone", "cat"):
        return source
    if is_op(node, "to", "expand", "view", "repeat", "slice", "permute"):
        return source if _keeps(node, source) else _before_widening(node, source)
    if is_op(node, "add", "sub") and _number(node, 1) == 0 and _same_type(node, source):
        return source
    if is_op(node, "mul", "div") and _number(node, 1) == 1 and _same_type(node, source):
        return source
    return source if name_of(node) in DROPOUTS and not arguments(node)["train"] else None


def _drop_empty(node: Node) -> None:
    """Leave out of a concatenation the parts that hold nothing, if others are left and of the type that comes out."""
    parts: Any = node.args[0]
    full = [part for part in parts if tensor_type(part).numel != 0]
    if full and all(tensor_type(part).dtype == tensor_type(node).dtype for part in full):
        node.args = (full, *node.args[1:])


def _before_widening(node: Node, source: Node) -> Node | None:
    """x where this is x cast to a wider float and back."""
    if not is_op(node, "to") or not is_op(source, "to") or source.meta["val"].dtype not in (torch.float32, torch.float64):
        return None
    x: Any = source.args[0]
    is_widened = x.meta["val"].dtype in NARROW or (x.meta["val"].dtype, source.meta["val"].dtype) == (torch.float32, torch.float64)
    return x if is_widened and _keeps(node, x) else None


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
