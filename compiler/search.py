"""Selection: which lossy rewrites together save most seconds within the budget.

1. Each (rule, site) is applied alone at one knob value; its drift is measured on a few ranking samples, its saving is predicted.
2. A ladder is built: from nothing, the move with most seconds saved per drift is taken, again and again, so rungs go from exact to reckless.
3. Rungs are evaluated jointly on the ranking part, by bisection for each budget of interest, since single drifts only rank (sums were
   off by 0.54 to 1.65 on measured pairs).
4. The best plans found are mutated (one knob up, another down) while evaluations and time are left.

Same candidates, same evidence, same seed: the same points, to the byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paretorch.ir.errors import LoweringError, ParetorchError, PlanError
from paretorch.ir.graph import Graph
from paretorch.plan import Choice, Knob
from paretorch.rewrites.apply import Candidate
from paretorch.stages import Stages

PROBE_SAMPLES = 16
GROUP = 8  # sites that are measured together, so that an executor has something to spread
MUTATIONS = 6
BUDGET_SHARES = (1.0, 0.5, 0.25)  # the frontier is explored at these parts of the budget, for `choose`


@dataclass(frozen=True)
class Move:
    """One lossy choice with what it does alone. saved: predicted seconds; drift: measured, or scaled from the site's measured knob."""

    choice: Choice
    saved: float
    drift: float

    @property
    def ratio(self) -> float:
        return self.saved / max(self.drift, 1e-9)


@dataclass(frozen=True)
class Point:
    """A plan's choices with what is known of it. loss: mean on the ranking part, with the half width of its 95 % interval."""

    choices: tuple[Choice, ...]
    predicted: float
    runtime: str
    loss: float
    half_width: float
    samples: int


@dataclass
class Problem:
    """What `search` needs to know, as functions, so that it knows no runtime and no model.

    apply: choices -> graph (raises ParetorchError if they do not go together); price: graph -> (seconds, runtime);
    drifts: (graphs, samples) -> label-free drift of each, or a sentence; loss: graph -> (mean, half width, n) on the ranking part.
    """

    candidates: Sequence[Candidate]
    apply: Callable[[tuple[Choice, ...]], Graph]
    price: Callable[[Graph], tuple[float, str]]
    drifts: Callable[[Sequence[Graph], int], list[float | str]]
    loss: Callable[[Graph], tuple[float, float, int]]
    limit: float
    max_evaluations: int
    stages: Stages
    seed: int = 0
    record: Callable[[str, Choice, str, float | None, float | None], None] = lambda *_: None  # verdict, choice, reason, saved, drift
    evidence: dict[str, Any] = field(default_factory=dict)


def search(problem: Problem) -> list[Point]:
    """All evaluated plans, fastest first; the empty plan is always among them."""
    base_seconds, base_runtime = problem.price(problem.apply(()))
    state = _State(problem, {(): Point((), base_seconds, base_runtime, 0.0, 0.0, 0)})
    moves = _measure_moves(state, base_seconds)
    wide = [move for move in moves if move.choice.site == "model"]
    narrow = [move for move in moves if move.choice.site != "model"]
    starts = [((), narrow), *(((w.choice,), [m for m in narrow if m.choice.rule != w.choice.rule]) for w in wide)]
    for start, usable in sorted(starts, key=lambda item: -len(item[0])):
        rungs = [tuple(start), *_ladder(start, usable)]
        for share in BUDGET_SHARES:
            _bisect(state, rungs, share * problem.limit)
    _mutate(state, moves)
    return sorted(state.points.values(), key=lambda point: (point.predicted, len(point.choices), str(point.choices)))


@dataclass
class _State:
    problem: Problem
    points: dict[tuple[Choice, ...], Point]
    broken: set[tuple[Choice, ...]] = field(default_factory=set)
    evaluations: int = 0

    @property
    def is_over(self) -> bool:
        return self.evaluations >= self.problem.max_evaluations or self.problem.stages.is_over

    def evaluate(self, choices: tuple[Choice, ...]) -> Point | None:
        """The point of these choices; None if they do not go together, or the search is over."""
        if choices in self.points or choices in self.broken:
            return self.points.get(choices)
        if self.is_over:
            return None
        try:
            graph = self.problem.apply(choices)
            seconds, runtime = self.problem.price(graph)
            loss, half_width, samples = self.problem.loss(graph)
        except (PlanError, LoweringError) as error:
            self.broken.add(choices)
            self.problem.record("in conflict", choices[-1], str(error).splitlines()[0], None, None)
            return None
        self.evaluations += 1
        self.problem.stages.tell("search", self.evaluations, self.problem.max_evaluations)
        self.points[choices] = Point(choices, seconds, runtime, loss, half_width, samples)
        return self.points[choices]


def _measure_moves(state: _State, base_seconds: float) -> list[Move]:
    """Every candidate alone: predicted saving at each knob value, drift measured at one of them and scaled to the others."""
    problem, moves = state.problem, []
    for start in range(0, len(problem.candidates), GROUP):
        problem.stages.tell("measure sites", start, len(problem.candidates))
        if problem.stages.is_over:
            _leave_unmeasured(problem, problem.candidates[start:])
            break
        group = [(c, knobs) for c in problem.candidates[start : start + GROUP] if (knobs := _usable_knobs(state, c, base_seconds))]
        middles = [knobs[len(knobs) // 2] for _, knobs in group]
        chosen = [_choice(candidate, middle[0]) for (candidate, _), middle in zip(group, middles, strict=True)]
        drifts = problem.drifts([problem.apply((choice,)) for choice in chosen], PROBE_SAMPLES)
        for (candidate, knobs), middle, choice, drift in zip(group, middles, chosen, drifts, strict=True):
            if isinstance(drift, str):
                problem.record("failed", choice, drift, middle[1], None)
                continue
            problem.evidence[f"drift {choice}"] = drift
            for knob, saved in knobs:
                moves.append(Move(_choice(candidate, knob), saved, drift * max(saved, 1e-12) / max(middle[1], 1e-12)))
                problem.record("not taken", moves[-1].choice, "other choices save more for the same loss", saved, drift)
    return moves


def _leave_unmeasured(problem: Problem, candidates: Sequence[Candidate]) -> None:
    for candidate in candidates:
        choice = _choice(candidate, candidate.knobs[-1])
        problem.record("not taken", choice, "the time limit had passed before it could be measured", None, None)


def _usable_knobs(state: _State, candidate: Candidate, base_seconds: float) -> list[tuple[Knob, float]]:
    """(knob, predicted seconds saved) of the values that save time, weaker first."""
    problem, usable, reason, best = state.problem, [], "", 0.0
    for knob in candidate.knobs:
        try:
            saved = base_seconds - problem.price(problem.apply((_choice(candidate, knob),)))[0]
        except ParetorchError as error:
            reason = str(error).splitlines()[0]
            continue
        best = max(best, saved)
        if saved > 0:
            usable.append((knob, saved))
    if not usable:
        choice = _choice(candidate, candidate.knobs[-1])
        if reason:
            problem.record("illegal", choice, reason, None, None)
        else:
            problem.record("priced out", choice, f"predicted to save {best * 1e3:.3f} ms of {base_seconds * 1e3:.3f} ms here", best, None)
    return usable


def _choice(candidate: Candidate, knob: Knob) -> Choice:
    return Choice(candidate.rule.name, candidate.site.name, knob)


def _ladder(start: tuple[Choice, ...], moves: Iterable[Move]) -> list[tuple[Choice, ...]]:
    """Rungs from `start`: each adds the move, or raises the knob, that saves most further seconds per further drift."""
    taken: dict[tuple[str, str], Move] = {}
    by_site: dict[tuple[str, str], list[Move]] = {}
    for move in moves:
        by_site.setdefault((move.choice.rule, move.choice.site), []).append(move)
    for options in by_site.values():
        options.sort(key=lambda move: move.saved)
    rungs: list[tuple[Choice, ...]] = []
    while True:
        steps = [
            (_gain(taken.get(key), move), move.choice.rule, move.choice.site, str(move.choice.knob), key, move)
            for key, options in by_site.items()
            for move in options
            if key not in taken or move.saved > taken[key].saved
        ]
        if not steps:
            return rungs
        *_, key, best = max(steps, key=lambda step: step[:4])
        taken[key] = best
        rungs.append((*(move.choice for move in taken.values()), *start))


def _gain(before: Move | None, after: Move) -> float:
    """Further seconds saved per further drift."""
    if before is None:
        return after.ratio
    return (after.saved - before.saved) / max(after.drift - before.drift, 1e-9)


def _bisect(state: _State, rungs: Sequence[tuple[Choice, ...]], limit: float) -> None:
    """Find the highest rung whose loss is within the limit; losses grow along the ladder, up to noise."""
    low, high = 0, len(rungs)
    while low < high and not state.is_over:
        middle = (low + high) // 2
        point = state.evaluate(rungs[middle])
        if point is not None and point.loss <= limit:
            low = middle + 1
        else:
            high = middle


def _mutate(state: _State, moves: Sequence[Move]) -> None:
    """From the fastest plan within the limit: replace or add one move; keep what is faster and within the limit."""
    chance = random.Random(state.problem.seed)
    for _ in range(MUTATIONS):
        good = [point for point in state.points.values() if point.loss <= state.problem.limit]
        if state.is_over or not good or not moves:
            return
        best = min(good, key=lambda point: (point.predicted, str(point.choices)))
        raised = chance.choice(sorted(moves, key=lambda move: str(move.choice)))
        kept = [choice for choice in best.choices if (choice.rule, choice.site) != (raised.choice.rule, raised.choice.site)]
        if len(kept) > 2 and chance.random() < 0.5:
            kept.pop(chance.randrange(len(kept)))
        if raised.choice.site == "model":
            kept = [choice for choice in kept if choice.rule != raised.choice.rule]
        state.evaluate((*kept, raised.choice))


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in both predicted seconds and loss, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.predicted, p.loss, len(p.choices))):
        if not best or point.loss < best[-1].loss:
            best.append(replace(point))
    return best
