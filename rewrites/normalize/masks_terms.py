"""What is added to scores, taken apart into keys that it hides and numbers that it adds.

An entry at or below HIDDEN hides a key: its weight is 0 in every float type as long as some key of the row is left and scores stay within
a few thousands. In a row where no key is left the finite value matters (all keys are then averaged), so such a mask keeps its values
unless every row is known to keep a key; that is decided in masks_join.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import shape_of
from paretorch.ir.ops import op_of
from paretorch.rewrites.normalize.attention_product import product_of
from paretorch.rewrites.normalize.attention_softmax import is_float_cast
from paretorch.rewrites.normalize.heads import Dims, aligned, is_tensor, spelled, trace
from paretorch.rewrites.normalize.masks import Conditions, Fixed, Part, without_repeats

HIDDEN = -1e4


@dataclass(frozen=True)
class Bias:
    """factor * source, added. source: a node, or a constant that was computed ahead."""

    source: Node | Tensor
    dims: Dims
    factor: float = 1.0


@dataclass(frozen=True)
class Hide:
    """Keys hidden where not all parts hold, by a value that replaces the score (fill) or is added to it.

    rest: what is added to the scores that are left; whole: the same mask as it stood, hiding and rest together.
    """

    parts: list[Part]
    value: float
    fill: bool
    rest: list[Bias] = field(default_factory=list)
    whole: Bias | None = None


Piece = Bias | Hide


class Terms:
    """Takes the added masks of one graph apart."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.known = conditions, conditions.known

    def pieces(self, node: Node, dims: Dims, factor: float) -> list[Piece]:
        """The pieces of  factor * node  whose sum it is."""
        node, dims, factor = self._behind(node, dims, factor)
        tensor = self.known.tensor(node)
        if tensor is not None:
            return self._constant(tensor, dims, factor)
        name, given = spelled(node), node.args
        if name in ("add", "sub") and all(is_tensor(operand) for operand in given[:2]) and not node.kwargs:
            found: list[Piece] = []
            for operand, sign in ((given[0], 1.0), (given[1], 1.0 if name == "add" else -1.0)):
                found += self.pieces(operand, aligned(dims, shape_of(operand), shape_of(node)), sign * factor)  # type: ignore[arg-type]
            return found
        hide = self._hide(node, dims, factor)
        return [hide if hide is not None else Bias(node, dims, factor)]

    def _behind(self, node: Node, dims: Dims, factor: float) -> tuple[Node, Dims, float]:
        """Behind views, casts between floats and products with numbers."""
        while True:
            seen = trace(node, dims, self.known.number)
            node, dims, factor = seen.node, seen.dims, factor * seen.factor
            if not is_float_cast(node):
                return node, dims, factor
            node = node.args[0]  # type: ignore[assignment]

    def _constant(self, tensor: Tensor, dims: Dims, factor: float) -> list[Piece]:
        scaled = tensor.double() * factor if factor != 1.0 else tensor
        if not scaled.is_floating_point():
            scaled = scaled.double()
        scaled, dims = without_repeats(scaled, dims)
        hidden = scaled <= HIDDEN
        lost = scaled[hidden]
        if not bool(hidden.any()):
            return [] if bool((scaled == 0).all()) else [Bias(scaled, dims)]
        infinite = torch.isinf(lost)
        if bool(infinite.any()) and not bool(infinite.all()):
            return [Bias(scaled, dims)]
        kept = scaled.masked_fill(hidden, 0.0)
        rest = [Bias(kept, dims)] if bool((kept != 0).any()) else []
        return [Hide([Fixed(~hidden, dims)], float(lost.max()), False, rest, Bias(scaled, dims))]

    def is_content(self, bias: Bias) -> bool:
        """Whether this is made by products or tables without large numbers, like scores themselves: a position bias, not a mask."""
        seen: set[Node] = set()
        front = [bias.source]
        if abs(bias.factor) >= -HIDDEN or not isinstance(bias.source, Node):
            return False
        while front:
            here = front.pop()
            if not isinstance(here, Node) or here in seen or _is_made(here):
                continue
            seen.add(here)
            number, constant = self.known.uniform(here), self.known.tensor(here)
            if number is not None or constant is not None:
                if (number is not None and number <= HIDDEN) or (constant is not None and not is_harmless(bias, constant)):
                    return False
                continue
            if not _passes_on(here) or _has_large_number(here):
                return False
            front += [argument for argument in here.all_input_nodes if is_float(argument)]
        return True

    def _hide(self, node: Node, dims: Dims, factor: float) -> Hide | None:
        name, given = spelled(node), node.args
        if name == "masked_fill":
            return self._chosen(node, dims, given[1], True, given[0], given[2], factor)
        if name == "where" and len(given) == 3:
            return self._chosen(node, dims, given[0], False, given[1], given[2], factor) or self._chosen(
                node, dims, given[0], True, given[2], given[1], factor
            )
        if name in ("tril", "triu"):
            value = self.known.uniform(given[0])
            if value is not None and value * factor <= HIDDEN:
                return Hide(self.conditions.parts(node, dims, True), value * factor, False, [], Bias(node, dims, factor))
        return None

    def _chosen(self, node: Node, dims: Dims, condition: Any, hidden: bool, kept: Any, value: Any, factor: float) -> Hide | None:
        """where(condition, kept, value) with a value that hides."""
        number = self.known.uniform(value)
        lost = number * factor if number is not None else 0.0
        if not lost <= HIDDEN or not is_tensor(condition):
            return None
        rest: list[Bias] = []
        if self.known.uniform(kept) != 0.0:
            if not is_tensor(kept):
                return None
            pieces = self.pieces(kept, aligned(dims, shape_of(kept), shape_of(node)), factor)
            if not all(isinstance(piece, Bias) for piece in pieces):
                return None
            rest = [piece for piece in pieces if isinstance(piece, Bias)]
        parts = self.conditions.parts(condition, aligned(dims, shape_of(condition), shape_of(node)), hidden)
        return Hide(parts, lost, False, rest, Bias(node, dims, factor))


_BOUNDED = ("add", "sub", "mul", "div", "neg", "tanh", "relu", "sigmoid", "gelu", "silu", "to")  # small numbers stay small


def _passes_on(node: Node) -> bool:
    """Whether large numbers come out of this op only if they go in."""
    op = op_of(node)
    return node.target is operator.getitem or (op is not None and (op.kind in ("view", "copy", "gather", "reduce") or op.name in _BOUNDED))


def _has_large_number(node: Node) -> bool:
    op = op_of(node)
    kinds = (int, float) if op is not None and op.name in _BOUNDED else (float,)
    return any(isinstance(argument, kinds) and abs(argument) >= -HIDDEN for argument in node.args)


def _is_made(node: Node) -> bool:
    """Whether this is the result of a product, a norm or a table."""
    op = op_of(node)
    return product_of(node) is not None or (
        op is not None and (op.kind in ("matrix", "convolution") or op.name in ("layer_norm", "rms_norm"))
    )


def is_harmless(bias: Bias, tensor: Tensor | None) -> bool:
    """Whether a bias is a known constant that hides no key."""
    if tensor is None:
        return False
    scaled = tensor.double() * bias.factor
    return bool(torch.isfinite(scaled).all()) and bool((scaled > HIDDEN).all())


def is_float(node: Node) -> bool:
    value: Any = node.meta.get("val")
    return not hasattr(value, "dtype") or bool(value.dtype.is_floating_point)
