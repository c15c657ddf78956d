"""Graphs in reduced precision for runtimes that take one precision for the whole model: strip the casts, set the runtime's own switch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.quantized import Rounding, rounding_of

HALF = (torch.bfloat16, torch.float16)
_WIDE = WeakTensorKeyDictionary()


def half_node(graph: Graph) -> Node | None:
    """The first value of half precision, or None."""
    return next((node for node in graph.nodes if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype in HALF), None)


def covers_products(graph: Graph) -> bool:
    """Whether every matrix product, convolution and attention of the graph is computed in half precision; what returns places only does not count."""
    kinds = ("matrix", "convolution", "attention")
    made = [node.meta["val"] for node in graph.calls if (op := op_of(node)) is not None and op.kind in kinds]
    found = [value for value in made if isinstance(value, Tensor)]
    return bool(found) and all(value.dtype in HALF for value in found)


def without_reduced(graph: Graph) -> Graph:
    """The same graph computed in f32: half constants are widened, casts to half or from it dropped."""
    other = graph.copy()
    for node in other.nodes:
        if node.op == "get_attr" and other.constants[str(node.target)].dtype in HALF:
            wide = Builder(other, node).constant(f"{node.target}_f32", other.constants[str(node.target)].float())
            other.replace(node, wide)
    for node in other.calls:
        if is_op(node, "to") and _is_half_cast(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif any(value in HALF for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)):
            node.args = tuple(_widened(value) for value in node.args)
            node.kwargs = {key: _widened(value) for key, value in node.kwargs.items()}
    return other.clean().retype()


def with_wide_weights(graph: Graph) -> Graph:
    """The same function with integer weights multiplied out once, not in each call: for torch, when calls count more than memory."""
    if all(rounding_of(node) is None for node in graph.calls):
        return graph
    other = graph.copy()
    for node in other.calls:
        rounding = rounding_of(node)
        if rounding is not None:
            given = arguments(node)
            values, scale = (other.constant(given[name]) for name in ("weight", "scale"))
            if values is not None and scale is not None:
                b = Builder(other, node, origin=origin_of(node))
                wide = b.constant(f"{given['weight'].target}_wide", _wide(rounding, values, scale, node.meta["val"].dtype))
                other.replace(node, b.linear(given["x"], wide, given["bias"]))
    return other.clean()


def _wide(rounding: Rounding, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a call with rounded weights multiplies by. Kept while the integers live, since plans of a search share them."""
    kept: dict[torch.dtype, Tensor] = _WIDE.setdefault(values, {})
    if dtype not in kept:
        kept[dtype] = rounding.widened(values, scale, dtype)
    return kept[dtype]


def _widened(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _is_half_cast(node: Node) -> bool:
    """A cast between floating types, one of them half and neither wider than f32."""
    source = node.args[0].meta["val"].dtype if isinstance(node.args[0], Node) else None
    dtypes = (source, node.meta["val"].dtype)
    return all(dtype in (*HALF, torch.float32) for dtype in dtypes) and any(dtype in HALF for dtype in dtypes)
