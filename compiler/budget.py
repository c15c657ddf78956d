"""Budget: what loss is allowed and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paretorch.ir.errors import BudgetError
from paretorch.metrics import METRICS, CorpusMetric, Metric, named

MEASURES = ("relative", "cosine", "kl", "top1")


@dataclass(frozen=True)
class Budget:
    """The loss that the caller allows; `Budget()` allows none, so only exact rewrites are used.

    One of three forms:
    - `Budget(drift=0.01, measure="relative")`: distance between the outputs of the original and of the optimized model, without labels.
      measure: "relative" (norm of the difference over norm), "cosine" (one minus cosine), "kl" (of the softmax of the last axis),
      "top1" (share of rows whose largest entry moved).
    - `Budget(metric="top1", max_drop=0.005)`: by name ("top1", "spearman", "f1", "perplexity"; see metrics.py), as a function
      `f(outputs, labels)` that gives one score per sample, higher is better, or as a `CorpusMetric`; data gives (inputs, labels).
    - `Budget(evaluate=f, max_drop=0.01)`: `f(model, items)` gives one score per item, higher is better; for loops such as decoding.

    confidence: None accepts a plan whose mean paired drop is within the budget (and whose interval is narrow enough to say so);
    0.95 requires that the upper end of the 95 % interval is within it.
    max_memory_bytes: peak memory that the plan may use; None for no limit.
    """

    drift: float | None = None
    measure: str = "relative"
    metric: Metric | str | None = None
    evaluate: Callable[[Any, Any], Any] | None = None
    max_drop: float | None = None
    confidence: float | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.evaluate is not None:
            raise BudgetError("a budget has both metric and evaluate; give one: metric scores batches, evaluate runs a loop of your own")
        scored = self.scorer is not None
        if scored and self.max_drop is None:
            raise BudgetError("a budget with a metric needs max_drop, the loss you allow in the metric's unit, for example max_drop=0.005")
        if self.max_drop is not None and not scored:
            raise BudgetError(
                f"max_drop={self.max_drop} needs metric= or evaluate=; for a budget without labels write drift={self.max_drop}"
            )
        if self.drift is not None and scored:
            raise BudgetError("a budget has both drift and a metric; give one of them")
        if self.measure not in MEASURES:
            raise BudgetError(f"no drift measure named {self.measure!r}; expected one of {', '.join(MEASURES)}")
        for name, limit in (("drift", self.drift), ("max_drop", self.max_drop)):
            if limit is not None and not (isinstance(limit, (int, float)) and math.isfinite(limit) and limit >= 0):
                raise BudgetError(f"{name}={limit!r} is not a loss; expected a finite number that is not below zero")
        if self.confidence is not None and not 0.5 < self.confidence < 1:
            raise BudgetError(f"confidence={self.confidence!r} is not a level between 0.5 and 1; for example 0.95")

    @property
    def is_exact(self) -> bool:
        """Whether this budget allows no loss at all."""
        return self.limit is None

    @property
    def limit(self) -> float | None:
        """The allowed loss in the unit of the measure; None if only exact rewrites are allowed."""
        return self.drift if self.drift is not None else self.max_drop

    @property
    def unit(self) -> str:
        """What a loss is called in reports."""
        if self.drift is not None:
            return f"{self.measure} drift"
        scorer = self.scorer
        return f"drop of {scorer.name if isinstance(scorer, CorpusMetric) else getattr(scorer, '__name__', 'the metric')}"

    @property
    def scorer(self) -> Metric | None:
        """What scores: the metric, looked up where a name was given, or `evaluate`; None if drift is measured. Raises BudgetError."""
        if isinstance(self.metric, str):
            return named(self.metric)
        if self.metric is None:
            return self.evaluate
        if not callable(self.metric) and not isinstance(self.metric, CorpusMetric):
            raise BudgetError(f"metric={self.metric!r} is no metric; expected {', '.join(METRICS)}, a function or a CorpusMetric")
        return self.metric
