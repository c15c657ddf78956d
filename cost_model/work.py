"""The work of a node: how many operations and bytes, and where it stands on the price curve of its kind. Numbers at the example's sizes.

Everything comes from the op table's columns and the types, nothing from names: an op without a row is opaque, and is priced by its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops import Op, op_of
from paretorch.ir.ops.costs import tensors, value_type
from paretorch.ir.types import DTYPE_NAMES

RATED_BY_FLOPS = ("matrix", "convolution", "attention")


@dataclass(frozen=True)
class Work:
    """What one node does.

    curves: names of the price curves that fit, the closest first; at: its place on them. A curve of a kind in RATED_BY_FLOPS has two axes
    (matrix: rows and the geometric mean of contracted and produced width; attention: batch x heads and keys; convolution: positions and the
    geometric mean of channels per group), all others one, the bytes moved. dtype: of what is computed. constant_bytes: weights it reads.
    """

    curves: tuple[str, ...]
    at: tuple[float, ...]
    flops: float
    bytes_moved: float
    dtype: str
    constant_bytes: float = 0.0

    @property
    def is_rated_by_flops(self) -> bool:
        return len(self.at) == 2


UNKNOWN_SIZE = 8
_other_sizes: ContextVar[dict[sympy.Symbol, int]] = ContextVar("sizes", default={})  # noqa: B039  # never changed in place


@contextmanager
def at_sizes(sizes: dict[sympy.Symbol, int]) -> Iterator[None]:
    """In this block these symbols stand for these sizes instead of the example's."""
    token = _other_sizes.set(sizes)
    try:
        yield
    finally:
        _other_sizes.reset(token)


def other_sizes() -> tuple[tuple[str, int], ...]:
    """What `at_sizes` set, as a key for what is kept."""
    return tuple(sorted((str(symbol), size) for symbol, size in _other_sizes.get().items()))


def number(value: Any, node: Node | None = None) -> float:
    """A size, count or formula as a plain number; symbols take the example's sizes. node: any node whose types have those symbols.

    A size that depends on what is in a tensor (how many entries are true) has no example: it counts as UNKNOWN_SIZE.
    """
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = value.node.expr
    hints = _hints(node) if node is not None else {}
    found = sympy.sympify(value).subs(hints)
    return float(found.subs(dict.fromkeys(found.free_symbols, UNKNOWN_SIZE)))


def _hints(node: Node) -> dict[Any, Any]:
    """The example's value of each symbol that the types of a node and its operands have."""
    for other in (node, *node.all_input_nodes):
        for tensor in torch.utils._pytree.tree_leaves(other.meta.get("val")):
            sizes = tensor.shape if isinstance(tensor, Tensor) else (tensor,)
            symbolic = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
            if symbolic is not None:
                return {**symbolic.node.shape_env.var_to_val, **_other_sizes.get()}
    return {}


def sizes(node: Node, value: Tensor) -> tuple[int, ...]:
    """The shape of a node's (or its operand's) tensor at the example's sizes."""
    return tuple(size if isinstance(size, int) else int(number(size, node)) for size in value.shape)


def tensor_values(node: Node) -> list[Tensor]:
    """The fake tensors that a node makes."""
    return [value for value in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def work_of(node: Node) -> Work:
    """The work of a call."""
    op = op_of(node)
    dtype = _dtype(node)
    constants = sum(number(t.nbytes, node) for a in node.all_input_nodes if a.op == "get_attr" for t in tensors(value_type(a)))
    if op is None:
        moved = sum(number(t.nbytes, node) for n in (node, *node.all_input_nodes) for t in tensors(value_type(n)))
        return Work(("elementwise",), (moved,), 0.0, moved, dtype, constants)
    moved, flops = number(op.bytes(node), node), number(op.flops(node), node)
    if op.kind in RATED_BY_FLOPS:
        at, kinds = PLACES[op.kind](node, flops)
        names = (*kinds, op.name) if op.kind != "matrix" else (op.name, *kinds)  # some products have a curve of their own
        return Work(names, at, flops, moved, dtype, constants)
    if op.kind == "view":
        moved = 2 * sum(prod(sizes(node, value)) * value.dtype.itemsize for value in tensor_values(node))
    return Work((op.name, op.kind), (moved,), flops, moved, dtype, constants)


def _dtype(node: Node) -> str:
    """The floating type that is computed with: of the operands that are no constants if there are any, else of all, else of the result."""
    operands = [value for a in node.all_input_nodes for value in tensor_values(a)]
    floats = [value for value in (*operands, *tensor_values(node)) if value.dtype.is_floating_point]
    return DTYPE_NAMES[floats[0].dtype] if floats else "f32"


Place = tuple[tuple[float, ...], tuple[str, ...]]


def _matrix_place(node: Node, flops: float) -> Place:
    result = sizes(node, tensor_values(node)[0])
    operands = [sizes(node, tensor_values(a)[0]) for a in node.all_input_nodes if tensor_values(a)]
    op = op_of(node)
    shares_weight = op is not None and op.axes == "linear"  # of two axes, or packed in three
    batched = not shares_weight and sum(len(shape) >= 3 for shape in operands) >= 2 and len(result) >= 3
    batch = prod(result[:-2]) if batched else 1
    produced = result[-1] if result else 1
    elements = max(prod(result), 1)
    contracted = flops / 2 / elements
    rows = elements / max(batch, 1) / max(produced, 1)
    return (max(rows, 1.0), max(sqrt(contracted * produced), 1.0)), ("matrix",)


def _attention_place(node: Node, flops: float) -> Place:
    query, key = (sizes(node, tensor_values(a)[0]) for a in node.args[:2])  # type: ignore[arg-type]
    bound = arguments(node)
    one_sided = bound.get("is_causal") or (bound.get("right") == 0 and bound.get("left", -1) < 0 and not bound.get("sinks"))
    plain = bound.get("mask") is None and bound.get("attn_mask") is None and bound.get("key_bias") is None
    kinds = ("attention.causal", "attention") if one_sided and plain else ("attention",)
    return (max(float(prod(query[:-2])), 1.0), max(float(key[-2]), 1.0)), kinds


def _convolution_place(node: Node, flops: float) -> Place:
    weight = sizes(node, tensor_values(node.args[1])[0])  # type: ignore[arg-type]
    result = sizes(node, tensor_values(node)[0])
    groups = int(arguments(node).get("groups") or 1)
    taps, channels = prod(weight[2:]), result[1] if len(result) > 2 else result[0]
    positions = prod(result) / max(channels, 1)
    per_group = sqrt(weight[1] * max(weight[0] / groups, 1))
    if groups > 1 and weight[1] == 1:
        return (max(positions, 1.0), max(float(channels), 1.0)), ("convolution.depthwise", "convolution")
    kinds = ("convolution.pointwise", "convolution") if taps == 1 else ("convolution",)
    return (max(positions, 1.0), max(per_group, 1.0)), kinds


PLACES = {"matrix": _matrix_place, "attention": _attention_place, "convolution": _convolution_place}


def kind_of(node: Node) -> str:
    """The kind of a call, "opaque" if its op has no row."""
    op: Op | None = op_of(node)
    return op.kind if op is not None else "opaque"
