"""Quality: how far outputs drifted, how much a metric dropped, and whether that is within a budget.

Drops are paired per sample, so that what makes samples differ cancels; the half width is then about 1.96 * sqrt(disagreement / n).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy
import torch
from torch import Tensor

from paretorch.ir.errors import BudgetError

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
RESAMPLES = 2000
FINEST_HALF_WIDTH = 0.0025  # a quarter of a point: narrower intervals are never demanded


# drift: distance of outputs, per sample


def drift(measure: str, expected: Sequence[Any], found: Sequence[Any]) -> Tensor:
    """f64[n]: the distance of each sample's outputs, 0 where they are equal.

    expected, found: flat outputs; the first axis of the first tensor counts the samples, a tensor without that axis belongs to all of them.
    measure: "relative" (norm of the difference over norm), "cosine" (one minus cosine), "kl" (of the softmax of the last axis, in nats) or
    "top1" (share of rows whose largest entry moved); the last two look at the first tensor of floats. Raises BudgetError.
    """
    if measure not in MEASURES:
        raise BudgetError(f"no drift measure named {measure!r}; expected one of {', '.join(MEASURES)}")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor)]
    if not pairs:
        raise BudgetError("the model returns no tensor, so the drift of its outputs cannot be measured; use Budget(metric=…) or evaluate=")
    for a, b in pairs:
        if a.shape != b.shape:
            raise BudgetError(f"an output has shape {list(b.shape)}, the original's has {list(a.shape)}; drift compares equal shapes")
    count = pairs[0][0].shape[0] if pairs[0][0].ndim else 1
    return MEASURES[measure]([(_rows(a, count), _rows(b, count)) for a, b in pairs], count)


def _rows(tensor: Tensor, count: int) -> Tensor:
    """f64[count, ...] with a row per sample; the caller's shape is kept from the second axis on."""
    wide = tensor.detach().double()
    return wide if wide.ndim and wide.shape[0] == count else wide.expand(count, *wide.shape)


Pairs = list[tuple[Tensor, Tensor]]


def _joined(pairs: Pairs, count: int) -> tuple[Tensor, Tensor]:
    """All outputs as one row per sample, f64[n, values]; entries that are equally infinite are left out, others make the drift infinite."""
    a = torch.cat([x.reshape(count, -1) for x, _ in pairs], 1)
    b = torch.cat([y.reshape(count, -1) for _, y in pairs], 1)
    same = (a == b) | (a.isnan() & b.isnan())
    equally = same & ~torch.isfinite(a)
    return a.masked_fill(equally, 0.0), b.masked_fill(equally, 0.0)


def _relative(pairs: Pairs, count: int) -> Tensor:
    a, b = _joined(pairs, count)
    scale = a.norm(dim=1)
    distance = (a - b).norm(dim=1)
    return torch.nan_to_num(torch.where(scale > 0, distance / scale, distance), nan=math.inf, posinf=math.inf)


def _cosine(pairs: Pairs, count: int) -> Tensor:
    a, b = _joined(pairs, count)
    norms = a.norm(dim=1) * b.norm(dim=1)
    distance = 1 - (a * b).sum(1) / norms
    both_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    return torch.nan_to_num(distance, nan=math.inf).clamp_min(0.0).masked_fill(both_zero, 0.0).masked_fill((a == b).all(1), 0.0)


def _logits(pairs: Pairs) -> tuple[Tensor, Tensor]:
    a, b = next(((a, b) for a, b in pairs if a.ndim > 1), pairs[0])
    return a, b


def _kl(pairs: Pairs, count: int) -> Tensor:
    a, b = (logits.log_softmax(-1) for logits in _logits(pairs))
    terms = torch.where(a == -math.inf, 0.0, a.exp() * (a - b))
    return torch.nan_to_num(terms.sum(-1), nan=math.inf, posinf=math.inf).clamp_min(0.0).reshape(count, -1).mean(1)


def _top1(pairs: Pairs, count: int) -> Tensor:
    a, b = _logits(pairs)
    return (a.argmax(-1) != b.argmax(-1)).double().reshape(count, -1).mean(1)


MEASURES: dict[str, Callable[[Pairs, int], Tensor]] = {"relative": _relative, "cosine": _cosine, "kl": _kl, "top1": _top1}


# drops: with intervals, against budgets


@dataclass(frozen=True)
class Drop:
    """Mean loss over n samples, in the metric's unit, with its 95 % interval; half_width is half of that interval's length."""

    mean: float
    half_width: float
    n: int
    low: float
    high: float


def paired_drop(before: Tensor, after: Tensor | None = None, *, seed: int = 0) -> Drop:
    """How much lower `after` scores than `before` on the same samples.

    before, after: f[n] scores, higher is better; without `after`, `before` holds the losses themselves. Where each loss is -1, 0 or 1 (right or
    wrong before and after), the interval is Bonett and Price's (2012), Wilson's adjustment for paired shares, which is honest when no sample changed;
    otherwise a bootstrap over samples. Raises BudgetError if there is no score, or the numbers do not pair.
    """
    if after is not None and before.shape != after.shape:
        raise BudgetError(
            f"{before.numel()} scores before and {after.numel()} after do not pair; expected one per sample on the same samples"
        )
    losses = (before if after is None else before.double() - after.double()).detach().double().reshape(-1).cpu().numpy()
    if len(losses) == 0:
        raise BudgetError("no score to compute a drop from; give some data")
    mean = float(losses.mean())
    if len(losses) == 1 or not numpy.isfinite(losses).all():
        return Drop(mean, math.inf, len(losses), -math.inf, math.inf)
    low, high = _share_interval(losses) if set(losses.tolist()) <= {-1.0, 0.0, 1.0} else _bootstrap(losses, seed)
    return Drop(mean, (high - low) / 2, len(losses), low, high)


def _share_interval(losses: Any) -> tuple[float, float]:
    n = len(losses)
    worse, better = (float((losses == 1).sum()) + 1) / (n + 2), (float((losses == -1).sum()) + 1) / (n + 2)
    half = Z * math.sqrt((worse + better - (worse - better) ** 2) / (n + 2))
    return worse - better - half, worse - better + half


def _bootstrap(losses: Any, seed: int) -> tuple[float, float]:
    draws = numpy.random.default_rng(seed)
    means = numpy.concatenate([losses[draws.integers(len(losses), size=(50, len(losses)))].mean(1) for _ in range(RESAMPLES // 50)])
    low, high = numpy.percentile(means, [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return float(low), float(high)


def samples_needed(drop: Drop, half_width: float) -> int:
    """The number of samples with which the interval would be that narrow, if further samples are like these."""
    if not math.isfinite(drop.half_width) or half_width <= 0:
        return 2 * drop.n
    return max(2, math.ceil(drop.n * (drop.half_width / half_width) ** 2))


def accepts(drop: Drop, limit: float, confidence: float | None = None) -> str | None:
    """None if a plan with this drop is within the limit; otherwise a sentence, with the number of samples that would do where too few are at fault.

    The mean must be within the limit and the half width at most max(limit, 0.0025). confidence: 0.95 asks for the upper end of the 95 %
    interval within the limit instead of the mean; other levels scale the interval.
    """
    about = f"the mean drop is {drop.mean:.4g} ± {drop.half_width:.2g} (95 % interval, n = {drop.n:,})"
    if not drop.mean <= limit:
        return f"{about}; the budget is {limit:g}"
    widest = max(limit, FINEST_HALF_WIDTH)
    if drop.half_width > widest:
        return f"{about}, too wide to tell for a budget of {limit:g}; about {samples_needed(drop, widest):,} samples would do"
    if confidence is None:
        return None
    scale = NormalDist().inv_cdf(0.5 + confidence / 2) / Z
    upper = drop.mean + (drop.high - drop.mean) * scale
    if upper <= limit:
        return None
    room = limit - drop.mean
    more = f"about {samples_needed(drop, room / scale):,} samples would do" if room > 0 else "no number of samples would do"
    return f"{about}, so at {confidence:.0%} confidence it may be {upper:.4g}; the budget is {limit:g}; {more}"


def split(n: int, seed: int, ranking_share: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices that rank plans and indices that accept them, both in order; which is which depends on the seed and the index only, by hash."""
    if not 0 < ranking_share < 1:
        raise BudgetError(f"ranking_share={ranking_share} is no share; expected a number between 0 and 1")
    if n < 2:
        raise BudgetError(f"{n} samples cannot be split into a part that ranks and a part that accepts; give at least two")
    order = sorted(range(n), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    ranking = min(n - 1, max(1, round(n * ranking_share)))
    return tuple(sorted(order[:ranking])), tuple(sorted(order[ranking:]))
