"""One mask from all that happens to the scores between product and softmax.

Hiding with -inf is the same as a key that is not seen. Hiding with a large finite value is the same in every row that keeps a key; in a row
that keeps none it averages over all keys, and an attention node gives zeros. So it becomes "not seen" only where every row is known to keep
a key (constants and bands, checked), and otherwise stays a value in an added mask: the lowest number of the type for filled scores, since a
score added to it is absorbed and the row is averaged evenly, as it was. Rows that -inf hides altogether were NaN and become zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paretorch.rewrites.normalize.attention_scores import Added, Item
from paretorch.rewrites.normalize.attention_softmax import Unraised
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, flat, leaves, length
from paretorch.rewrites.normalize.masks import Conditions, Fixed, Given, Part, Placed, strip_of
from paretorch.rewrites.normalize.masks_index import Strip
from paretorch.rewrites.normalize.masks_known import LARGEST
from paretorch.rewrites.normalize.masks_terms import HIDDEN, Bias, Hide, Piece, Terms, is_harmless


@dataclass(frozen=True)
class Frame:
    """The axes of the queries and of the keys."""

    queries: Dim
    keys: Dim

    def place(self, strip: Strip) -> Strip | None:
        """The strip as column - row, columns along the keys; None if it is about other axes."""
        for candidate in (strip, strip.swapped()):
            if leaves(candidate.plus) == leaves(self.keys) and leaves(candidate.minus) == leaves(self.queries):
                return candidate
        return None


@dataclass(frozen=True)
class Band:
    """The attributes of the attention op that say what positions let a query see."""

    left: int = -1
    right: int = -1
    sinks: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Chosen:
    """An added mask: the sum of `terms` where all parts hold, `value` elsewhere."""

    parts: list[Part]
    terms: list[Any]
    value: float


@dataclass
class Masks:
    """band; seen: conditions that must all hold; added: Bias and Chosen terms to add."""

    band: Band = field(default_factory=Band)
    seen: list[Fixed | Given] = field(default_factory=list)
    added: list[Bias | Chosen] = field(default_factory=list)


class Joiner:
    """Joins the masks of one graph. lowest: the least finite number of the type that the attention is computed in."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.known, self.terms = conditions, conditions.known, Terms(conditions)

    def pieces(self, items: tuple[Item, ...], zeroed: list[tuple[Any, bool]]) -> list[Piece]:
        """What happens to the scores, from the product outwards. items: from the softmax inwards; zeroed: conditions that set weights
        to zero after it. Raises Unraised.
        """
        pieces: list[Piece] = []
        for item in reversed(items):
            if isinstance(item, Added):
                pieces += self.terms.pieces(item.node, item.dims, item.factor)
                continue
            if not item.value <= HIDDEN:
                raise Unraised(f"scores are replaced by {item.value:g} where {item.condition.name} says so; that hides no key")
            pieces.append(Hide(self.conditions.parts(item.condition, item.dims, item.hidden), item.value, True))
        return self._fold_zeroed(pieces, items, zeroed)

    def join(self, pieces: list[Piece], causal: list[Part], frame: Frame, lowest: float) -> Masks:
        """causal: what hides keys besides the pieces. Raises Unraised."""
        if self._every_row_keeps_a_key([*pieces, Hide(causal, -math.inf, True)], frame):
            pieces = [_hardened(piece) for piece in pieces]
        hard, added = self._split(pieces, frame, lowest)
        band, seen = self._band([*hard, *causal], frame)
        return Masks(band, seen, added)

    def _fold_zeroed(self, pieces: list[Piece], items: tuple[Item, ...], zeroed: list[tuple[Any, bool]]) -> list[Piece]:
        """Weights zeroed by the condition that also filled the scores: a row without keys is zeros, as in the attention node."""
        if not zeroed:
            return pieces
        filled = {(item.condition, not item.hidden) for item in items if not isinstance(item, Added)}
        others = [piece for piece in pieces if isinstance(piece, Bias) and not self._is_harmless(piece)]
        hides = [piece for piece in pieces if isinstance(piece, Hide)]
        if any(entry not in filled for entry in zeroed):
            raise Unraised(f"weights are set to zero where {zeroed[0][0].name} says so, which did not hide these scores before the softmax")
        if all(hide.value == -math.inf for hide in hides):
            return pieces
        if len(hides) != 1 or others:
            raise Unraised("weights are set to zero after the softmax, and other masks may hide what is left of a row")
        return [_hardened(piece) for piece in pieces]

    # which rows keep a key

    def _is_harmless(self, bias: Bias) -> bool:
        tensor = bias.source if isinstance(bias.source, Tensor) else self.known.tensor(bias.source)
        return is_harmless(bias, tensor) or self.terms.is_content(bias)

    def _every_row_keeps_a_key(self, pieces: list[Piece], frame: Frame) -> bool:
        parts: list[Part] = []
        for piece in pieces:
            biases = [piece] if isinstance(piece, Bias) else piece.rest
            if not all(self._is_harmless(bias) for bias in biases):
                return False
            parts += piece.parts if isinstance(piece, Hide) else []
        if not all(isinstance(part, Fixed) or (isinstance(part, Placed) and frame.place(part.strip)) for part in parts):
            return False
        truth = together(parts, frame)
        if truth is not None:
            matrix, axes = truth
            keys = [place for place, axis in enumerate(axes) if axis in leaves(frame.keys)]
            return bool(matrix.any(dim=keys).all()) if keys else bool(matrix.all())
        strips = [frame.place(part.strip) for part in parts if isinstance(part, Placed)]
        own = all(strip is not None and (strip.low or 0) <= 0 <= (strip.high or 0) for strip in strips)
        return own and len(strips) == len(parts) and length(leaves(frame.queries)) == length(leaves(frame.keys))

    # what is hidden and what is added

    def _split(self, pieces: list[Piece], frame: Frame, lowest: float) -> tuple[list[Part], list[Bias | Chosen]]:
        hard: list[Part] = []
        added: list[Bias | Chosen] = []
        for place, piece in enumerate(pieces):
            later = pieces[place + 1 :]
            if isinstance(piece, Bias):
                added.append(piece)
            elif piece.value == -math.inf and not any(
                isinstance(other, Hide) and other.fill and math.isfinite(other.value) for other in later
            ):
                hard += piece.parts
                added += piece.rest
            elif not piece.fill:
                added.append(self._smallest(piece))
            elif piece.value == -math.inf:
                added = [Chosen(piece.parts, [*added], -math.inf)]
            else:
                added = [Chosen(piece.parts, [*added], self._filled_value(piece, pieces[:place], later, lowest))]
        return hard, added

    def _smallest(self, piece: Hide) -> Bias | Chosen:
        """An added mask as it stood, or written anew from its condition where that varies over fewer axes."""
        whole = piece.whole
        assert whole is not None  # every hiding that is added has one
        before = {axis for axis in flat(whole.dims) if axis.size != 1}
        after = {axis for part in piece.parts for axis in flat(dims_of(part)) if axis.size != 1}
        return Chosen(piece.parts, [], piece.value) if not piece.rest and after < before else whole

    def _filled_value(self, piece: Hide, earlier: list[Piece], later: list[Piece], lowest: float) -> float:
        """The value to add where scores were filled, such that a row without keys averages as it did."""
        if piece.value * torch.finfo(torch.float64).eps <= -1e6:
            return max(piece.value, lowest)  # any score is absorbed, so that these entries are what they were
        alone = all(not isinstance(other, Bias) and not other.rest and _agrees(other, piece) for other in later)
        if not alone or not all(self._is_harmless(other) if isinstance(other, Bias) else _agrees(other, piece) for other in earlier):
            raise Unraised(
                f"scores are filled with {piece.value:g} and another mask hides keys too; a row in which nothing is seen would change"
            )
        return lowest

    # positions

    def _band(self, parts: list[Part], frame: Frame) -> tuple[Band, list[Fixed | Given]]:
        placed: list[Part] = []
        rest: list[Fixed | Given] = []
        grid = set(leaves(frame.queries)) | set(leaves(frame.keys))
        for part in parts:
            if isinstance(part, Placed):
                if frame.place(part.strip) is not None:
                    placed.append(part)
                elif part.condition is not None:
                    rest.append(part.condition)
                else:
                    raise Unraised("a causal mask is about other axes than queries and keys")
            elif isinstance(part, Fixed) and {axis for axis in flat(part.dims) if axis.size != 1} <= grid:
                placed.append(part)
            else:
                rest.append(part)
        if not placed:
            return Band(), rest
        truth = together(placed, frame, whole=True)
        if truth is not None:
            matrix = truth[0].reshape(int(length(leaves(frame.queries))), int(length(leaves(frame.keys))))
            band = band_of(matrix)
            if band is not None:
                return band, rest
            return Band(), [*rest, *(part for part in placed if isinstance(part, Fixed)), *_conditions(placed)]
        rest += [part for part in placed if isinstance(part, Fixed)]
        strips = [strip for part in placed if isinstance(part, Placed) and (strip := frame.place(part.strip)) is not None]
        low = max((strip.low for strip in strips if strip.low is not None), default=None)
        high = min((strip.high for strip in strips if strip.high is not None), default=None)
        return band_between(low, high, length(leaves(frame.keys)) - length(leaves(frame.queries))), rest


def _agrees(other: Hide, filled: Hide) -> bool:
    return other.value == -math.inf or (other.fill and other.value == filled.value)


def _conditions(parts: list[Part]) -> list[Given]:
    return [part.condition for part in parts if isinstance(part, Placed) and part.condition is not None]


def axes_of(piece: Piece) -> list[set[Axis]]:
    """The axes that each mask of a piece varies over."""
    biases = [piece] if isinstance(piece, Bias) else piece.rest
    dims = [bias.dims for bias in biases] + [dims_of(part) for part in (piece.parts if isinstance(piece, Hide) else [])]
    return [{axis for axis in flat(found) if axis.size != 1} for found in dims]


def dims_of(part: Part) -> Dims:
    """The dimensions of the condition behind a part."""
    if isinstance(part, Placed):
        return part.condition.dims if part.condition is not None else [part.strip.minus, part.strip.plus]
    return part.dims


def _hardened(piece: Piece) -> Piece:
    return Hide(piece.parts, -math.inf, piece.fill, piece.rest, piece.whole) if isinstance(piece, Hide) else piece


def together(parts: list[Part], frame: Frame, *, whole: bool = False) -> tuple[Tensor, list[Axis]] | None:
    """All parts as one constant over the axes that any of them varies over (over queries and keys if `whole`); None if a size is
    not known or the constant would be too large.
    """
    grid = [axis for axis in (*leaves(frame.queries), *leaves(frame.keys)) if axis.size != 1]
    needed = {axis for part in parts if isinstance(part, Fixed) for axis in flat(part.dims) if axis.size != 1}
    if whole or any(isinstance(part, Placed) for part in parts):
        needed |= set(grid)
    axes = sorted(needed - set(grid), key=id) + [axis for axis in grid if axis in needed]
    sizes = [axis.size for axis in axes]
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) > LARGEST:
        return None
    truth = torch.ones(sizes, dtype=torch.bool)
    for part in parts:
        if isinstance(part, Fixed):
            truth = truth & _spread(part, axes)
        elif isinstance(part, Placed):
            strip = frame.place(part.strip)
            assert strip is not None  # the caller has placed them all
            truth = truth & _strip_matrix(strip, frame).reshape([axis.size for axis in axes if axis in grid])
    return truth, axes


def _spread(part: Fixed, axes: list[Axis]) -> Tensor:
    """The constant with one dimension for each of these axes, 1 where it does not vary."""
    mine = [axis for axis in flat(part.dims) if axis.size != 1]
    tensor = part.tensor.reshape([axis.size for axis in mine])
    order = sorted(range(len(mine)), key=lambda place: axes.index(mine[place]))
    return tensor.permute(order).reshape([axis.size if axis in mine else 1 for axis in axes])


def _strip_matrix(strip: Strip, frame: Frame) -> Tensor:
    rows, columns = int(length(leaves(frame.queries))), int(length(leaves(frame.keys)))
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    truth = torch.ones(rows, columns, dtype=torch.bool)
    truth = truth & (distance >= strip.low) if strip.low is not None else truth
    return truth & (distance <= strip.high) if strip.high is not None else truth


def band_between(low: int | None, high: int | None, ahead: Any) -> Band:
    """The attributes for  low <= column - row <= high; ahead: by how much there are more keys than queries."""
    if low is None and high is None:
        return Band()
    if high is None:
        return Band(left=-low) if low is not None and low <= 0 else Band(left=0, offset=low or 0)
    if (high > 0 and high == ahead) or high < 0 or (low is not None and low > 0):
        return Band(left=-1 if low is None else high - low, right=0, offset=high)
    return Band(left=-1 if low is None else -low, right=high)


def band_of(truth: Tensor) -> Band | None:
    """The attributes that describe a constant matrix of queries by keys exactly; None if it is no band."""
    rows, columns = truth.shape
    bounds = strip_of(truth)
    if bounds is not None:
        return band_between(*bounds, columns - rows)
    if not bool(truth[-1].any()):
        return None
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    high = int(distance[truth].max())
    below = distance <= high
    full = (truth == below).all(dim=0)
    sinks = int(full.int().cumprod(0).sum())
    seen = truth[-1].nonzero().flatten()
    first = int(seen[-1])
    while first > 0 and bool(truth[-1, first - 1]):
        first -= 1
    low = first - (rows - 1)
    if sinks == 0 or high < low or not torch.equal(truth, below & ((distance >= low) | (torch.arange(columns) < sinks))):
        return None
    band = band_between(low, high if high < columns - 1 else None, columns - rows)
    return Band(band.left, band.right, sinks, band.offset)
