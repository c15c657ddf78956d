"""What every workload gives: a model, inputs of stated shapes, real data, and a way to score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from paretorch.metrics import Metric


@dataclass(frozen=True)
class Case:
    """One model at one shape. inputs: what `optimize` takes as example_inputs."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """A quality question about a case. data: (inputs, labels) batches, or items for `evaluate`; one of metric and evaluate is set.

    max_drop: the budget that the project's goal names; baseline: what the original is known to score.
    """

    case: Case
    data: Sequence[Any]
    max_drop: float
    metric: Metric | str | None = None
    evaluate: Callable[[Any, Any], Any] | None = None
    baseline: str = ""


@dataclass(frozen=True)
class Workload:
    """cases: at the shapes that the goals name; task: None where the goals ask for exact plans only."""

    name: str
    card: str
    cases: Callable[[], Sequence[Case]]
    task: Callable[[int], Task] | None = None
    licence: str = ""
    extras: dict[str, Any] = field(default_factory=dict)
