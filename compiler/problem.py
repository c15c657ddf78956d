"""What a search is asked, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.plan import Choice
from paretorch.rewrites.apply import Candidate
from paretorch.savings import Pricing
from paretorch.stages import Stages


class ConflictError(PlanError):
    """Choices that do not go together. choice: the one that could not be applied after the others."""

    def __init__(self, sentence: str, choice: Choice) -> None:
        super().__init__(sentence)
        self.choice = choice


@dataclass(frozen=True)
class Point:
    """A plan's choices with what is known of it. loss: mean on the ranking part, with the half width of its 95 % interval.

    predicted, measured_seconds: of one call; measured only where the plan was compiled. memory_bytes: predicted peak.
    """

    choices: tuple[Choice, ...]
    predicted: float
    runtime: str
    loss: float
    half_width: float
    samples: int
    memory_bytes: int = 0
    measured_seconds: float | None = None


@dataclass
class Problem:
    """What `search` needs to know, as functions, so that it knows no runtime and no model.

    apply: choices -> graph (raises ConflictError if they do not go together); price: graph -> (seconds, runtime); drifts: (choices, samples) ->
    label-free drift of each choice alone, or a sentence; loss: (choices, their graph) -> (mean, half width, n) on the ranking part.
    memory: graph -> bytes; pricing: how savings are predicted; break_even: choice -> from which size it pays, "" where no size varies; conflict:
    of choices, one that is known not to go with another, and why, so that the pair is not tried; slot: equal for choices of which a plan takes one
    at most, and may put one in the place of another. was_interrupted: set if Ctrl-C ended the search; what was found is kept.
    """

    candidates: Sequence[Candidate]
    apply: Callable[[tuple[Choice, ...]], Graph]
    price: Callable[[Graph], tuple[float, str]]
    drifts: Callable[[Sequence[Choice], int], list[float | str]]
    loss: Callable[[tuple[Choice, ...], Graph], tuple[float, float, int]]
    limit: float
    max_evaluations: int
    stages: Stages
    seed: int = 0
    record: Callable[[str, Choice, str, float | None, float | None], None] = lambda *_: None  # verdict, choice, reason, saved, drift
    evidence: dict[str, Any] = field(default_factory=dict)
    memory: Callable[[Graph], int] = lambda _: 0
    pricing: Pricing | None = None  # None: every candidate alone, on the whole graph
    break_even: Callable[[Choice], str] = lambda _: ""
    conflict: Callable[[tuple[Choice, ...]], tuple[Choice, str] | None] = lambda _: None
    slot: Callable[[Choice], Hashable] = lambda choice: (choice.rule, choice.site)
    was_interrupted: bool = False
