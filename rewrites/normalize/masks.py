"""Masks as a small algebra: what a condition on scores says, as parts that must all hold.

A part is a strip (positions compared in the graph), a constant, or a condition that depends on an input. And, not, or under not, casts,
broadcasts and gathers by consecutive indices are seen through, so that in  causal & padding[:, None, None, :]  the causal part is a
strip or a constant and the part from the input stays as small as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.rewrites.normalize.heads import Axis, Dims, aligned, is_tensor, leaves, spelled, trace
from paretorch.rewrites.normalize.masks_index import Strip, compared, gathered
from paretorch.rewrites.normalize.masks_known import Known


@dataclass(frozen=True)
class Fixed:
    """A constant condition; true where the key is seen."""

    tensor: Tensor
    dims: Dims


@dataclass(frozen=True)
class Given:
    """A condition computed from inputs; hidden: whether it is true where the key is hidden."""

    node: Node
    dims: Dims
    hidden: bool


@dataclass(frozen=True)
class Placed:
    """A strip, with the condition it was read from in case its axes are not those of queries and keys (None where they must be)."""

    strip: Strip
    condition: Given | None


Part = Fixed | Given | Placed


class Conditions:
    """Reads the conditions of one graph."""

    def __init__(self, known: Known) -> None:
        self.known = known

    def parts(self, node: Node, dims: Dims, hidden: bool) -> list[Part]:
        """The parts that must all hold for a key to be seen; hidden: whether the condition is true where keys are hidden."""
        seen = trace(node, dims)
        node, dims = seen.node, seen.dims
        tensor = self.known.tensor(node)
        if tensor is not None:
            truth = tensor.bool()
            return self._fixed(~truth if hidden else truth, dims)
        name = spelled(node)
        if name in ("logical_not", "bitwise_not"):
            return self.parts(node.args[0], dims, not hidden)  # type: ignore[arg-type]
        joint = ("__and__", "bitwise_and", "logical_and") if not hidden else ("__or__", "bitwise_or", "logical_or")
        if name in joint or (name == "mul" and not hidden):
            return self._both(node, dims, hidden)
        if name in ("_to_copy", "to") and is_tensor(node.args[0]) and self._is_truth(node.args[0]):
            return self.parts(node.args[0], dims, hidden)  # type: ignore[arg-type]
        if name in ("eq", "ne") and self._is_truth(node.args[0]) and self.known.uniform(node.args[1]) in (0.0, 1.0):
            flipped = (name == "eq") == (self.known.uniform(node.args[1]) == 0.0)
            return self.parts(node.args[0], dims, hidden != flipped)  # type: ignore[arg-type]
        return self._leaf(node, dims, hidden)

    def _fixed(self, tensor: Tensor, dims: Dims) -> list[Part]:
        return [] if bool(tensor.all()) else [Fixed(*without_repeats(tensor, dims))]

    def _is_truth(self, node: Any) -> bool:
        """Whether every element of this is known to be 0 or 1."""
        if not is_tensor(node):
            return False
        if tensor_type(node).dtype == "bool":
            return True
        name = spelled(node)
        if name in ("tril", "triu", "view", "expand", "unsqueeze", "_to_copy", "to", "clone", "slice", "permute", "transpose"):
            return self._is_truth(node.args[0])
        return self.known.uniform(node) in (0.0, 1.0)

    def _both(self, node: Node, dims: Dims, hidden: bool) -> list[Part]:
        operands: list[Any] = list(node.args[:2])
        if not all(is_tensor(operand) and self._is_truth(operand) for operand in operands):
            return self._leaf(node, dims, hidden)
        found: list[Part] = []
        for operand in operands:
            found += self.parts(operand, aligned(dims, shape_of(operand), shape_of(node)), hidden)
        return found

    def _leaf(self, node: Node, dims: Dims, hidden: bool) -> list[Part]:
        given = Given(node, dims, hidden)
        uniform = self.known.uniform(node)
        if uniform is not None and (uniform != 0.0) != hidden:
            return []
        comparison = compared(self.known, node, dims, negated=hidden)
        if comparison is True:
            return []
        strip = comparison if isinstance(comparison, Strip) else self._triangle(node, dims, hidden)
        if strip is not None:
            return [Placed(strip, given)]
        behind = gathered(self.known, node, dims)
        if behind is not None:
            return self.parts(behind[0], behind[1], hidden)
        return self._buffer(node, dims, hidden) or [given]

    def _triangle(self, node: Node, dims: Dims, hidden: bool) -> Strip | None:
        """tril and triu of ones."""
        name = spelled(node)
        if name not in ("tril", "triu") or self.known.uniform(node.args[0]) in (None, 0.0):
            return None
        diagonal = arguments(node)["diagonal"]
        rows, columns = leaves(dims[-2]), leaves(dims[-1])
        is_lower = (name == "tril") != hidden
        if hidden:
            diagonal += 1 if name == "tril" else -1
        return Strip(columns, rows, high=diagonal) if is_lower else Strip(columns, rows, low=diagonal)

    def _buffer(self, node: Node, dims: Dims, hidden: bool) -> list[Part] | None:
        """A slice, of a size known only when the model runs, of a constant triangle or band."""
        starts, sliced = [0] * len(dims), node
        while spelled(node) == "slice":
            given = arguments(node)
            if not isinstance(given["start"] or 0, int) or (given["start"] or 0) < 0 or given["step"] != 1:
                return None
            starts[given["dim"]] += given["start"] or 0
            node = given["self"]
        tensor = self.known.tensor(node)
        if tensor is None or tensor.dim() < 2 or any(size != 1 for size in tensor.shape[:-2]):
            return None
        truth = ~tensor.bool() if hidden else tensor.bool()
        bounds = strip_of(truth.reshape(truth.shape[-2:]))
        if bounds is None:
            return None
        shift = starts[-2] - starts[-1]
        low, high = (bound + shift if bound is not None else None for bound in bounds)
        strip = Strip(leaves(dims[-1]), leaves(dims[-2]), low, high)
        return [Placed(strip, Given(sliced, dims, hidden))] if low is not None or high is not None else []


def without_repeats(tensor: Tensor, dims: Dims) -> tuple[Tensor, Dims]:
    """A constant without the axes along which it does not vary."""
    split = [leaves(dim) or (Axis(1),) for dim in dims]
    axes = [axis for dim in split for axis in dim]
    if not all(isinstance(axis.size, int) for axis in axes):
        return tensor, dims
    tensor = tensor.reshape([axis.size for axis in axes])
    kept: Dims = []
    for place, axis in enumerate(axes):
        first = tensor.narrow(place, 0, 1)
        repeats = axis.size != 1 and tensor.numel() > 0 and bool((tensor == first).all())
        tensor = first if repeats else tensor
        kept.append(() if repeats else (axis,))
    return tensor, kept


def strip_of(truth: Tensor) -> tuple[int | None, int | None] | None:
    """The bounds of  low <= column - row <= high  if that is where a matrix is true; None stands for a bound that cuts nothing off."""
    rows, columns = truth.shape
    if not bool(truth.any()):
        return None
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    inside = distance[truth]
    low, high = int(inside.min()), int(inside.max())
    if not torch.equal(truth, (distance >= low) & (distance <= high)):
        return None
    return (low if low > 1 - rows else None, high if high < columns - 1 else None)
