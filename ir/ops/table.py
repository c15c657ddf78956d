"""The op table: one row per op, every fact about the op in that row.

A row names the torch overloads that it covers (its meaning is what they compute), and has a column for each question that another
room may ask: how many flops, how many bytes, how it treats the axes of its input, its Triton text, its ONNX form.
An overload with no row is legal and opaque: it runs as torch and is priced by its bytes and one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.errors import RuleError

Target = Any  # a torch.ops overload, or a function of the operator module for sizes


@dataclass(frozen=True)
class Missing:
    """A column that has no entry, with the reason; the op then runs as torch."""

    reason: str


@dataclass(frozen=True)
class Op:
    """One row.

    name: as printed; targets: the overloads it covers, the first is the one that builders emit.
    flops: (node) -> count, an int or sympy expression, a fused multiply-add is two. bytes: (node) -> bytes read and written.
    axes: name of the axis rule in `ir/analyze/axes.py` that says how dimensions pass through ("pointwise", "linear", "view", …);
    None stops token-axis rewrites at this op. moves_data: False if it only re-describes its input (view, transpose, …).
    triton: text with {0}, {1}, … for the operands of an elementwise op. onnx: the ONNX op that it becomes.
    """

    name: str
    targets: tuple[Target, ...]
    kind: str  # the class of price curve: "elementwise", "matrix", "convolution", "attention", "row", "reduce", "gather", "copy", "view", "scalar"
    flops: Callable[[Node], Any]
    bytes: Callable[[Node], Any]
    axes: str | None = None
    elementwise: bool = False
    commutative: bool = False
    triton: str | Missing = Missing("not an elementwise op")
    onnx: str | Missing = Missing("runs as torch")
    source: str = ""

    @property
    def moves_data(self) -> bool:
        return self.kind not in ("view", "scalar")


OPS: dict[str, Op] = {}
_BY_TARGET: dict[Target, Op] = {}


def define(op: Op) -> Op:
    """Add a row. Raises RuleError if its name or one of its overloads already has one."""
    taken = op.name in OPS or any(target in _BY_TARGET for target in op.targets)
    if taken:
        raise RuleError(f"the op table already has a row for {op.name} or for one of {[str(t) for t in op.targets]}")
    OPS[op.name] = op
    for target in op.targets:
        _BY_TARGET[target] = op
    return op


def row(name: str) -> Op:
    """The row of that name. Raises RuleError."""
    if name not in OPS:
        raise RuleError(f"no op named {name!r} in the op table; it has {', '.join(sorted(OPS))}")
    return OPS[name]


def op_of(node: Node) -> Op | None:
    """The row that covers this node; None for inputs, constants, outputs and opaque ops."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


def is_op(node: Any, *names: str) -> bool:
    """Whether this is a node of one of the ops with these names."""
    if not isinstance(node, Node):
        return False
    op = op_of(node)
    return op is not None and op.name in names


def aten(name: str) -> Target:
    """The overload `aten.<name>`: "linear.default", "add.Tensor"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")
