"""Graphs in reduced precision for runtimes that take one precision for the whole model: strip the casts, set the runtime's own switch."""

from __future__ import annotations

import torch
from torch import Tensor

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op, op_of

HALF = (torch.bfloat16, torch.float16)


def covers_products(graph: Graph) -> bool:
    """Whether every matrix product, convolution and attention of the graph is computed in half precision."""
    found = [node for node in graph.calls if (op := op_of(node)) is not None and op.kind in ("matrix", "convolution", "attention")]
    return bool(found) and all(isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype in HALF for node in found)


def without_reduced(graph: Graph) -> Graph:
    """The same graph computed in f32: half constants are widened, casts to half or from it dropped."""
    other = graph.copy()
    for node in other.nodes:
        if node.op == "get_attr" and other.constants[str(node.target)].dtype in HALF:
            wide = Builder(other, node).constant(f"{node.target}_f32", other.constants[str(node.target)].float())
            other.replace(node, wide)
    for node in other.calls:
        if is_op(node, "to") and _is_float_cast(node):
            node.replace_all_uses_with(node.args[0])
        elif any(isinstance(value, torch.dtype) and value in HALF for value in (*node.args, *node.kwargs.values())):
            node.args = tuple(torch.float32 if isinstance(v, torch.dtype) and v in HALF else v for v in node.args)
            node.kwargs = {k: torch.float32 if isinstance(v, torch.dtype) and v in HALF else v for k, v in node.kwargs.items()}
    return other.clean().retype()


def _is_float_cast(node: torch.fx.Node) -> bool:
    """A cast between floating types, one of them half."""
    source = node.args[0].meta["val"] if isinstance(node.args[0], torch.fx.Node) else None
    if not isinstance(source, Tensor) or not source.dtype.is_floating_point or not node.meta["val"].dtype.is_floating_point:
        return False
    return source.dtype in HALF or node.meta["val"].dtype in HALF
