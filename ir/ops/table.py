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

KINDS: dict[str, str] = {  # the class of price curve
    "elementwise": "one output element from one element of each operand",
    "matrix": "products with two flops per element of the result and of the contracted axis",
    "convolution": "products of windows with weights",
    "attention": "scores, softmax and mixing in one op",
    "row": "softmax and norms: statistics over an axis, then an output of the input's shape",
    "reduce": "sums, extremes, sorts and scans along axes",
    "gather": "reads or writes at places that are computed",
    "copy": "moves or makes data without arithmetic",
    "view": "describes the same data anew",
    "scalar": "numbers that are computed from sizes",
}

AXES: dict[str, str] = {  # how the axes of operands become those of the result; one function each in `ir/analyze/axis_rules.py`
    "pointwise": "operands are broadcast; the result has the axes where they meet",
    "last_axis": "statistics over the last len(normalized_shape) axes; all axes stay",
    "softmax": "every entry along `dim` depends on the whole axis; all axes stay",
    "reduce": "the axes in `dim` (all of them if there is none) go, or have length one with `keepdim`",
    "scan": "every entry depends on its place along `dim` or `dims`; all axes stay, of topk a shorter one",
    "spatial": "[N, C, *spatial]: channels are contracted or kept, spatial axes get new lengths",
    "linear": "x[..., C] with weight[D, C], or [D, G, C / G] packed: the last axis is contracted, a new one made",
    "matmul": "[..., M, K] with [..., K, N], or vectors: K is contracted",
    "addmm": "the second and third operand as in matmul, the first is added by broadcast",
    "attention": "query[B, H, Tq, D], key[B, Hk, Tk, D], value[B, Hk, Tk, Dv] -> [B, H, Tq, Dv]",
    "view": "the same elements in the same order under other axes; factors of sizes tell which",
    "permute": "axes in the order of `dims`",
    "transpose": "axes `dim0` and `dim1`, or the only two, change places",
    "unsqueeze": "a new axis of length one at `dim`",
    "squeeze": "axes of length one go: those in `dim`, or all",
    "expand": "axes of length one get a length; new axes in front",
    "repeat": "axes get a multiple of their length; new axes in front",
    "select": "the axis `dim` goes: one entry of it is taken, by place",
    "slice": "a part of the axis `dim`, by place",
    "split": "parts of the axis `dim`, one result each, by place",
    "unbind": "the axis `dim` goes: one result for each of its entries",
    "cat": "the axis `dim` is as long as those of all operands together",
    "stack": "operands of equal axes along a new axis at `dim`",
    "pad": "axes get entries at their ends",
    "create": "made from sizes, or like its first operand; new axes of a constant, or its axes",
    "embedding": "rows of the first operand at the places in the second: its axes, then the row's",
    "gather": "entries along `dim` at the places in `index`; all other axes stay",
    "index_select": "entries along `dim` at the places in the vector `index`",
    "index": "entries at the places in `indices`, or writes at places: then the axes of what is written to",
    "match_tokens": "see `paretorch.ir.ops.tokens`",
    "merge_tokens": "see `paretorch.ir.ops.tokens`",
    "source_map": "see `paretorch.ir.ops.tokens`",
    "weigh_tokens": "see `paretorch.ir.ops.tokens`",
    "class_weights": "see `paretorch.ir.ops.token_choice`",
    "match_above": "see `paretorch.ir.ops.token_ragged`",
    "follow_map": "see `paretorch.ir.ops.token_ragged`",
    "places_among": "see `paretorch.ir.ops.token_context`",
    "unmerge_tokens": "see `paretorch.ir.ops.restore`",
    "match_to_places": "see `paretorch.ir.ops.scoped`",
    "assign_tokens": "see `paretorch.ir.ops.scoped`",
    "merge_by_map": "see `paretorch.ir.ops.scoped`",
    "unmerge_by_map": "see `paretorch.ir.ops.scoped`",
    "fold_frames": "see `paretorch.ir.ops.clips`",
    "unfold_frames": "see `paretorch.ir.ops.clips`",
    "scalar": "a number, or one output of an op with several",
}


@dataclass(frozen=True)
class Missing:
    """A column that has no entry, with the reason; the op then runs as torch."""

    reason: str


@dataclass(frozen=True)
class Step:
    """One line of a row's computation. text: with {argument} for operands and numbers by their names in the schema, {step} for earlier steps.

    reduction: a key of REDUCTIONS if it makes one number of the row; only_with: the argument without which the step is left out, and stands for
    the one before it.
    """

    name: str
    text: str
    reduction: str = ""
    only_with: str = ""


REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True)
class RowText:
    """Triton text of an op that takes statistics over its last axis, as steps of which the last is the result: {row} is what it takes them of.

    axis: the argument that names the axis; of the other arguments those with a place in the text may be anything, `keepdim`, `dtype` and switches
    of torch's own too, the rest must be as `fixed` says or at their defaults. per_row: whether the result is one number a row.
    """

    row: str
    axis: str
    steps: tuple[Step, ...]
    fixed: tuple[tuple[str, Any], ...] = ()
    per_row: bool = False


@dataclass(frozen=True)
class OpTemplate:
    """The op is a kernel of its own: the name of a template of whole ops. roles: (what the template calls an operand, the op's argument)."""

    name: str
    roles: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Op:
    """One row.

    name: as printed; targets: the overloads it covers, the first is the one that builders emit.
    kind: a key of KINDS. flops: (node) -> count, an int or sympy expression in the graph's symbols, a fused multiply-add is two.
    bytes: (node) -> bytes read and written. axes: a key of AXES; None stops token-axis rewrites at this op.
    launches: (node) -> how many kernels torch starts for it.
    moves_data: False if it only re-describes its input (view, transpose, …).
    triton: text with {0}, {1}, … for the operands of an elementwise op; where an option in words changes it, a text per value of the option, and where
    operands may be missing, one per set of those that are given ("min and max"); of an op over rows the steps of its computation; of an op that is a
    kernel of its own the template.
    onnx: the ONNX op that it becomes, or an emitter of `codegen/onnx/`.
    definition: the function of torch ops that it runs as, where that is several passes over memory; its price is then theirs.
    """

    name: str
    targets: tuple[Target, ...]
    kind: str
    flops: Callable[[Node], Any]
    bytes: Callable[[Node], Any]
    axes: str | None = None
    elementwise: bool = False
    commutative: bool = False
    triton: str | dict[str, str] | RowText | OpTemplate | Missing = Missing("not an elementwise op")
    onnx: str | Missing = Missing("runs as torch")
    source: str = ""
    definition: Callable[..., Any] | None = None
    launches: Callable[[Node], int] = lambda node: 1

    @property
    def moves_data(self) -> bool:
        return self.kind not in ("view", "scalar")


OPS: dict[str, Op] = {}
_BY_TARGET: dict[Target, Op] = {}


def define(op: Op) -> Op:
    """Add a row. Raises RuleError if its name or one of its overloads already has one, or its kind or axis rule is unknown."""
    if op.kind not in KINDS or (op.axes is not None and op.axes not in AXES):
        raise RuleError(
            f"the row of {op.name} has kind {op.kind!r} and axis rule {op.axes!r}; known: {', '.join(KINDS)}; {', '.join(AXES)}"
        )
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
