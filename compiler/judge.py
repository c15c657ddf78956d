"""What a plan costs in quality: losses per sample, paired with the original model's on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paretorch.budget import Budget
from paretorch.capture import Program
from paretorch.cost_model.quality import Drop, drift, paired_drop
from paretorch.data import Batch, Split, map_outputs
from paretorch.ir.errors import BudgetError
from paretorch.ir.protocols import Executable

FIRST_LOOK = 128  # samples after which a plan may be found clearly within the budget, or clearly not


class Judge:
    """Losses of executables against the original model. Scores of the original are computed once per part and kept."""

    def __init__(self, program: Program, budget: Budget, split: Split, as_model: Callable[[Executable], Any]) -> None:
        self.program, self.budget, self.split, self._as_model = program, budget, split, as_model
        self._scores: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Any, ...]] = {}

    def ranking(self, execute: Executable, least: float, most: float) -> Tensor:
        """f64[n]: loss per sample on the ranking part, until its interval lies below the least limit of interest or beyond the greatest."""
        return self._until(execute, self.split.ranking, lambda drop: drop.high < least or drop.low > most)

    def held_out(self, execute: Executable, limit: float) -> Tensor:
        """f64[n]: loss per sample on the part that never ranks; cut short only where its whole interval is beyond the limit."""
        return self._until(execute, self.split.held_out, lambda drop: drop.low > limit)

    def _until(self, execute: Executable, items: Sequence[Any], is_clear: Callable[[Drop], bool]) -> Tensor:
        """Losses of the items in order; looked at whenever their number has doubled."""
        losses, look = [], FIRST_LOOK
        for item in items:
            losses.append(self._losses(execute, [item]))
            count = sum(part.numel() for part in losses)
            if count >= look and len(losses) < len(items):
                look = 2 * count
                if is_clear(paired_drop(torch.cat(losses))):
                    break
        return torch.cat(losses)

    def scores(self, execute: Executable, part: str = "held_out") -> tuple[Tensor, Tensor]:
        """Scores of the original and of the executable on one part, f64[n] each; for drift budgets 0 and minus the drift."""
        items = getattr(self.split, part)
        loss = self._losses(execute, items)
        original = torch.zeros_like(loss) if self._is_drift else torch.cat([self._original_scores(item) for item in items])
        return original, original - loss

    def output_drift(self, execute: Executable, samples: int) -> float:
        """Mean relative distance of the outputs on the first ranking samples: the label-free signal that orders sites.

        For `evaluate` budgets, whose items only the user's loop can run, it is the loss itself.
        """
        if self.budget.evaluate is not None:
            return float(self._losses(execute, _first(self.split.ranking, samples)).mean())
        return _mean_drift(execute, self.probe(samples))

    def probe(self, samples: int) -> list[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]:
        """(inputs, outputs of the original, count) of the first ranking batches: what `drift_of` needs in another process."""
        return [(b.inputs, self._original_outputs(b), b.count) for b in _first(self.split.ranking, samples)]

    @property
    def _is_drift(self) -> bool:
        return self.budget.drift is not None

    def _losses(self, execute: Executable, items: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            if self._is_drift:
                parts = [drift(self.budget.measure, self._original_outputs(b), execute(*b.inputs))[: b.count] for b in items]
                return torch.cat(parts).double()
            return torch.cat([self._original_scores(item) - self._score(execute, item) for item in items])

    def _score(self, execute: Executable, item: Any) -> Tensor:
        if self.budget.evaluate is not None:
            return as_scores(self.budget.evaluate(self._as_model(execute), [item]), None, "evaluate")
        assert self.budget.metric is not None  # a budget is drift, metric or evaluate
        outputs = self.program.unflatten(execute(*item.inputs))
        return as_scores(self.budget.metric(map_outputs(outputs, item.count, len(item.inputs[0])), item.labels), item.count, "metric")

    def _original_scores(self, item: Any) -> Tensor:
        if id(item) not in self._scores:
            self._scores[id(item)] = self._score(self.program.run_original, item)
        return self._scores[id(item)]

    def _original_outputs(self, batch: Batch) -> tuple[Any, ...]:
        if id(batch) not in self._outputs:
            self._outputs[id(batch)] = tuple(self.program.run_original(*batch.inputs))
        return self._outputs[id(batch)]


def _mean_drift(execute: Executable, probe: Sequence[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]) -> float:
    with torch.no_grad():
        parts = [drift("relative", expected, execute(*inputs))[:count] for inputs, expected, count in probe]
    return float(torch.cat(parts).mean())


def drift_of(module: torch.fx.GraphModule, probe: Sequence[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]) -> float | str:
    """Mean relative drift of a graph's module, or the first line of what torch said; a plain function, so that any executor can run it."""
    try:
        return _mean_drift(module, probe)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch cannot run this plan: {str(error).splitlines()[0]}"


def _first(items: Sequence[Any], samples: int | None) -> Sequence[Any]:
    if samples is None:
        return items
    chosen, total = [], 0
    for item in items:
        if total >= samples:
            break
        chosen.append(item)
        total += item.count if isinstance(item, Batch) else 1
    return chosen


def as_scores(scores: Any, count: int | None, name: str) -> Tensor:
    """f64[n] from what the user's function returned. Raises BudgetError if it is not one finite number per sample."""
    try:
        found = torch.as_tensor(scores).detach().double().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BudgetError(f"{name} returned {type(scores).__name__}; expected one number per sample, higher is better") from error
    if count is not None and found.numel() != count:
        raise BudgetError(
            f"{name} returned {found.numel()} scores for {count} samples; expected one per sample, so that drops can be paired"
        )
    if found.numel() == 0 or not bool(torch.isfinite(found).all()):
        bad = "no score" if found.numel() == 0 else "NaN" if any(math.isnan(x) for x in found.tolist()) else "an infinite score"
        raise BudgetError(f"{name} returned {bad}; a budget can only be kept with finite scores")
    return found
