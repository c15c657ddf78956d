"""What a plan costs in quality: losses per sample, paired with the original model's on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paretorch.budget import Budget
from paretorch.capture import Program
from paretorch.cost_model.quality import Drop, drift, paired_drop
from paretorch.data import Batch, Split, map_outputs
from paretorch.ir.errors import BudgetError, LoweringError
from paretorch.ir.protocols import Executable
from paretorch.metrics import CorpusMetric
from paretorch.spread import running_plan

CALIBRATION_SAMPLES = 64  # on which rules measure values of their knobs
FIRST_LOOK = 128  # samples after which a plan may be found clearly within the budget, or clearly not


class NotFiniteError(BudgetError):
    """A score is NaN or infinite: the metric's fault where the original is scored, else the plan's."""


class Judge:
    """Losses of executables against the original model.

    Of each item a record is made, with a row per sample: its drift, its score, or for a `CorpusMetric` its statistics. Records of the original
    are computed once and kept.
    """

    def __init__(self, program: Program, budget: Budget, split: Split, as_model: Callable[[Executable], Any]) -> None:
        self.program, self.budget, self.split, self._as_model = program, budget, split, as_model
        self._records: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Any, ...]] = {}

    def ranking(self, execute: Executable, least: float, most: float) -> Tensor:
        """f64[n]: loss per sample on the ranking part, until its interval lies below the least limit of interest or beyond the greatest."""
        return self._until(execute, self.split.ranking, lambda drop: drop.high < least or drop.low > most)

    def held_out(self, execute: Executable, limit: float) -> Tensor:
        """f64[n]: loss per sample on the part that never ranks; cut short only where its whole interval is beyond the limit."""
        return self._until(execute, self.split.held_out, lambda drop: drop.low > limit)

    def _until(self, execute: Executable, items: Sequence[Any], is_clear: Callable[[Drop], bool]) -> Tensor:
        """Losses of the items in order; looked at whenever their number has doubled."""
        records: list[Tensor] = []
        look = FIRST_LOOK
        for item in items:
            records.append(self._record(execute, item))
            count = sum(len(record) for record in records)
            if count >= look and len(records) < len(items):
                look = 2 * count
                losses = self._losses(items[: len(records)], records)
                if is_clear(paired_drop(losses)):
                    return losses
        return self._losses(items, records)

    def scores(self, execute: Executable, part: str = "held_out") -> tuple[Tensor, Tensor]:
        """Scores of the original and of the executable on one part, f64[n] each; for drift budgets 0 and minus the drift."""
        items = getattr(self.split, part)
        losses = self._losses(items, [self._record(execute, item) for item in items])
        original = torch.zeros_like(losses) if self._is_drift else self._original_scores(items)
        return original, original - losses

    def output_drift(self, execute: Executable, samples: int) -> float:
        """Mean relative distance of the outputs on the first ranking samples: the label-free signal that orders sites.

        For `evaluate` budgets, whose items only the user's loop can run, it is the loss itself.
        """
        if self.budget.evaluate is not None:
            items = _first(self.split.ranking, samples)
            return float(self._losses(items, [self._record(execute, item) for item in items]).mean())
        with torch.no_grad():
            return _mean_drift(execute, self.probe(samples))

    def inputs(self) -> list[tuple[Any, ...]]:
        """Flat inputs of the first ranking batches, on which rules measure their values; the example where only the user's own loop can run those."""
        if self.budget.evaluate is not None:
            return [tuple(self.program.example)]
        return [batch.inputs for batch in _first(self.split.ranking, CALIBRATION_SAMPLES)]

    def probe(self, samples: int) -> list[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]:
        """(inputs, outputs of the original, count) of the first ranking batches: what `drift_of` needs in another process."""
        return [(b.inputs, self._original_outputs(b), b.count) for b in _first(self.split.ranking, samples)]

    @property
    def _is_drift(self) -> bool:
        return self.budget.drift is not None

    def _losses(self, items: Sequence[Any], records: Sequence[Tensor]) -> Tensor:
        """f64[n]: loss per sample of an executable with these records of the items; the mean is the drift or the drop."""
        found = torch.cat(list(records))
        if self._is_drift:
            return found
        original = self._original_scores(items)
        try:
            return original - self._per_sample(found)
        except NotFiniteError as error:
            raise LoweringError(f"on the outputs of this plan, {error}") from error

    def _original_scores(self, items: Sequence[Any]) -> Tensor:
        """f64[n]: scores of the original on these items."""
        for item in items:
            if id(item) not in self._records:
                self._records[id(item)] = self._record(self.program.run_original, item)
        return self._per_sample(torch.cat([self._records[id(item)] for item in items]))

    def _per_sample(self, records: Tensor) -> Tensor:
        """f64[n]: scores, whose mean is the metric over these records."""
        scorer = self.budget.scorer
        if not isinstance(scorer, CorpusMetric):
            return records
        return as_scores(scorer.pseudo(records), len(records), scorer.name)

    def _record(self, execute: Executable, item: Any) -> Tensor:
        """As `_scored`. Raises LoweringError where scores are not finite for a plan, and are for the original."""
        try:
            return self._scored(execute, item)
        except NotFiniteError as error:
            if execute == self.program.run_original:
                raise
            self._scored(self.program.run_original, item)
            raise LoweringError(f"on the outputs of this plan, {error}") from error

    @torch.no_grad()
    def _scored(self, execute: Executable, item: Any) -> Tensor:
        """f64[B] drifts or scores, or f64[B, k] statistics, of one item."""
        if self._is_drift:
            return drift(self.budget.measure, self._original_outputs(item), execute(*item.inputs))[: item.count].double()
        if self.budget.evaluate is not None:
            return as_scores(self.budget.evaluate(self._as_model(execute), [item]), None, "evaluate")
        scorer = self.budget.scorer
        assert scorer is not None  # a budget is drift, metric or evaluate
        outputs = map_outputs(self.program.unflatten(execute(*item.inputs)), item.count, len(item.inputs[0]))
        if isinstance(scorer, CorpusMetric):
            return as_statistics(scorer.collect(outputs, item.labels), item.count, scorer.name)
        return as_scores(scorer(outputs, item.labels), item.count, "metric")

    def _original_outputs(self, batch: Batch) -> tuple[Any, ...]:
        if id(batch) not in self._outputs:
            self._outputs[id(batch)] = tuple(self.program.run_original(*batch.inputs))
        return self._outputs[id(batch)]


def _mean_drift(execute: Executable, probe: Sequence[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]) -> float:
    return float(torch.cat([drift("relative", expected, execute(*inputs))[:count] for inputs, expected, count in probe]).mean())


def drift_of(execute: Executable, probe: Sequence[tuple[tuple[Tensor, ...], tuple[Any, ...], int]]) -> float | str:
    """Mean relative drift of a graph, or the first line of what torch said; a plain function, so that any executor can run it."""
    try:
        with running_plan():
            return _mean_drift(execute, probe)
    except LoweringError as error:
        return str(error)


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
    found = _as_numbers(scores, name, "one number per sample, higher is better").reshape(-1)
    if count is not None and found.numel() != count:
        raise BudgetError(
            f"{name} returned {found.numel()} scores for {count} samples; expected one per sample, so that drops can be paired"
        )
    _check_finite(found, name)
    return found


def as_statistics(statistics: Any, count: int, name: str) -> Tensor:
    """f64[n, k] from what a corpus metric collected. Raises BudgetError if it is not one row of finite numbers per sample."""
    found = _as_numbers(statistics, name, "a row of numbers per sample").cpu()
    if found.ndim != 2 or len(found) != count:
        raise BudgetError(f"{name} collected {list(found.shape)} for {count} samples; expected a row per sample, [{count}, k]")
    _check_finite(found, name)
    return found


def _as_numbers(numbers: Any, name: str, expected: str) -> Tensor:
    try:
        return torch.as_tensor(numbers).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BudgetError(f"{name} returned {type(numbers).__name__}; expected {expected}") from error


def _check_finite(found: Tensor, name: str) -> None:
    if found.numel() == 0 or not bool(torch.isfinite(found).all()):
        bad = "no score" if found.numel() == 0 else "NaN" if bool(found.isnan().any()) else "an infinite score"
        raise NotFiniteError(f"{name} returned {bad}; a budget can only be kept with finite scores")
