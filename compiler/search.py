"""Selection: which lossy rewrites together save most seconds within the budget.

1. Each (rule, site) is applied alone at one knob value; its drift is measured on a few ranking samples, its saving is predicted.
2. A ladder is built: from nothing, the move with most seconds saved per drift is taken, again and again, so rungs go from exact to reckless.
3. Rungs are evaluated jointly on the ranking part, by bisection for each budget of interest, since single drifts only rank (sums were
   off by 0.54 to 1.65 on measured pairs).
4. The best plan found is refined by single steps while evaluations and time are left.

Same candidates, same evidence, same seed: the same points, to the byte.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paretorch.ir.errors import LoweringError, PlanError
from paretorch.ir.graph import Graph
from paretorch.plan import Choice, Knob
from paretorch.rewrites.apply import Candidate
from paretorch.rewrites.rule import MODEL
from paretorch.savings import Pricing, Savings
from paretorch.stages import Stages

PROBE_SAMPLES = 16
GROUP = 8  # sites that are measured together, so that an executor has something to spread
SITES_SHARE = 0.5  # of the time left, in which sites are measured alone; the rest is for plans
REFINEMENTS = 8
WIDE_SHARE = 0.2  # of the budget: what a rewrite of the whole model may lose to be part of every plan
BUDGET_SHARES = (1.0, 0.5, 0.25)  # the frontier is explored at these parts of the budget, for `choose`


class ConflictError(PlanError):
    """Choices that do not go together. choice: the one that could not be applied after the others."""

    def __init__(self, sentence: str, choice: Choice) -> None:
        super().__init__(sentence)
        self.choice = choice


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


def search(problem: Problem) -> list[Point]:
    """All evaluated plans, fastest first; the empty plan is always among them."""
    base = problem.apply(())
    base_seconds, base_runtime = problem.price(base)
    state = _State(problem, {(): Point((), base_seconds, base_runtime, 0.0, 0.0, 0, problem.memory(base))})
    try:
        _explore(state, base_seconds)
    except KeyboardInterrupt:
        problem.was_interrupted = True
    return sorted(state.points.values(), key=lambda point: (point.predicted, len(point.choices), str(point.choices)))


def _explore(state: _State, base_seconds: float) -> None:
    problem = state.problem
    moves = _measure_moves(state, base_seconds)
    wide = [move for move in moves if move.choice.site == MODEL]
    narrow = [move for move in moves if move.choice.site != MODEL]
    starts: list[tuple[tuple[Choice, ...], list[Move]]] = [((), narrow)]
    starts += [((w.choice,), [m for m in narrow if m.choice.rule != w.choice.rule]) for w in wide]
    for start, usable in sorted(starts, key=lambda item: -len(item[0])):
        if not start and _is_dominated(state):
            continue
        rungs = [start, *_ladder(start, usable, problem.slot)]
        state.evaluate(start)
        for share in BUDGET_SHARES:
            _bisect(state, rungs, share * problem.limit)
    for share in BUDGET_SHARES:
        _refine(state, moves, share * problem.limit)


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
        """The point of these choices, without those that do not go with the others; None if it cannot be had, or the search is over."""
        choices, graph = self._fitting(tuple(sorted(choices, key=str)))
        if graph is None or choices in self.points or self.is_over:
            return self.points.get(choices)
        try:
            seconds, runtime = self.problem.price(graph)
            loss, half_width, samples = self.problem.loss(choices, graph)
        except (PlanError, LoweringError) as error:
            self.broken.add(choices)
            failed = choices[0] if len(choices) == 1 else Choice("plan", "; ".join(map(str, choices)))
            self.problem.record("failed", failed, str(error).splitlines()[0], None, None)
            return None
        self.evaluations += 1
        self.problem.stages.tell("search", self.evaluations, self.problem.max_evaluations)
        self.points[choices] = Point(choices, seconds, runtime, loss, half_width, samples, self.problem.memory(graph))
        return self.points[choices]

    def _fitting(self, choices: tuple[Choice, ...]) -> tuple[tuple[Choice, ...], Graph | None]:
        """The choices that go together, and their graph; no graph if the plan is known already, works or not."""
        while choices not in self.points and choices not in self.broken:
            known = self.problem.conflict(choices)
            try:
                if known is None:
                    return choices, self.problem.apply(choices)
            except ConflictError as error:
                known = error.choice, str(error).splitlines()[0]
            self.problem.record("in conflict", known[0], known[1], None, None)
            choices = tuple(choice for choice in choices if choice != known[0])
        return choices, None


def _is_dominated(state: _State) -> bool:
    """Whether a rewrite of the whole model is so good that plans without it are not worth a search."""
    return any(
        len(choices) == 1 and choices[0].site == MODEL and point.loss <= WIDE_SHARE * state.problem.limit
        for choices, point in state.points.items()
    )


def _measure_moves(state: _State, base_seconds: float) -> list[Move]:
    """Every candidate alone: predicted saving at each knob value, drift measured at one of them and scaled to the others."""
    problem, until = state.problem, state.problem.stages.share_of_rest(SITES_SHARE)
    candidates = _in_turn(problem.candidates)
    moves: dict[int, list[Move]] = {}
    savings = Savings(problem.candidates, problem.pricing or _one_by_one(problem, base_seconds))
    for start in range(0, len(candidates), GROUP):
        problem.stages.tell("measure sites", start, len(candidates))
        if problem.stages.elapsed >= until:
            _leave_unmeasured(problem, candidates[start:])
            break
        group = [(c, knobs) for c in candidates[start : start + GROUP] if (knobs := _usable_knobs(state, savings, c, base_seconds))]
        middles = [knobs[len(knobs) // 2] for _, knobs in group]
        chosen = [_choice(candidate, middle[0]) for (candidate, _), middle in zip(group, middles, strict=True)]
        drifts = problem.drifts(chosen, PROBE_SAMPLES)
        for (candidate, knobs), middle, choice, drift in zip(group, middles, chosen, drifts, strict=True):
            if isinstance(drift, str):
                problem.record("failed", choice, drift, middle[1], None)
                continue
            problem.evidence[f"drift {choice}"] = drift
            found = moves.setdefault(id(candidate), [])
            for knob, saved in knobs:
                found.append(Move(_choice(candidate, knob), saved, drift * max(saved, 1e-12) / max(middle[1], 1e-12)))
                problem.record("not taken", found[-1].choice, "other choices save more for the same loss", saved, drift)
    return [move for candidate in problem.candidates for move in moves.get(id(candidate), ())]


def _in_turn(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those of the whole model first, then a site of each rule in turn, from far apart to close: what a short time leaves out is spread."""
    counts: Counter[str] = Counter()
    ranked = []
    for place, candidate in enumerate(candidates):
        number, counts[candidate.rule.name] = counts[candidate.rule.name], counts[candidate.rule.name] + 1
        ranked.append((candidate.site.name != MODEL, int(f"{number:032b}"[::-1], 2), place))
    return [candidates[place] for *_, place in sorted(ranked)]


def _one_by_one(problem: Problem, base_seconds: float) -> Pricing:
    def saved(choice: Choice) -> float:
        return base_seconds - problem.price(problem.apply((choice,)))[0]

    return Pricing(id, saved, saved, lambda _: True)


def _leave_unmeasured(problem: Problem, candidates: Sequence[Candidate]) -> None:
    for candidate in candidates:
        choice = _choice(candidate, candidate.knobs[-1])
        problem.record(
            "not taken", choice, "the time for measuring sites had passed before its turn; a longer time_limit reaches it", None, None
        )


def _usable_knobs(state: _State, savings: Savings, candidate: Candidate, base_seconds: float) -> list[tuple[Knob, float]]:
    """(knob, predicted seconds saved) of the values that save time, weaker first."""
    problem = state.problem
    found, reason = savings.of(candidate)
    usable = [(knob, saved) for knob, saved in found if saved > 0]
    if not usable:
        choice, best = _choice(candidate, candidate.knobs[-1]), max((saved for _, saved in found), default=0.0)
        if not found:
            problem.record("illegal", choice, reason, None, None)
        else:
            here = f"predicted to save {best * 1e3:.3f} ms of {base_seconds * 1e3:.3f} ms here"
            pays = problem.break_even(choice)
            problem.record("priced out", choice, f"{here}; {pays}" if pays else here, best, None)
    return usable


def _choice(candidate: Candidate, knob: Knob) -> Choice:
    return Choice(candidate.rule.name, candidate.site.name, knob)


def _ladder(start: tuple[Choice, ...], moves: Iterable[Move], slot: Callable[[Choice], Hashable]) -> list[tuple[Choice, ...]]:
    """Rungs from `start`: each adds the move, or raises the knob, that saves most further seconds per further drift."""
    taken: dict[Hashable, Move] = {}
    by_slot: dict[Hashable, list[Move]] = {}
    for move in moves:
        by_slot.setdefault(slot(move.choice), []).append(move)
    steps = {key: _best_step(None, options) for key, options in by_slot.items()}
    rungs: list[tuple[Choice, ...]] = []
    while steps:
        key = max(steps, key=lambda key: steps[key][0])
        taken[key] = steps[key][1]
        rungs.append((*(move.choice for move in taken.values()), *start))
        left = [move for move in by_slot[key] if move.saved > taken[key].saved]
        if left:
            steps[key] = _best_step(taken[key], left)
        else:
            del steps[key]
    return rungs


def _best_step(before: Move | None, options: Iterable[Move]) -> tuple[tuple[float, str, str, str], Move]:
    """(what it is ordered by, move) of the option of one slot that gains most."""
    ordered = (((_gain(before, move), move.choice.rule, move.choice.site, str(move.choice.knob)), move) for move in options)
    return max(ordered, key=lambda step: step[0])


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


def _refine(state: _State, moves: Sequence[Move], limit: float) -> None:
    """From the fastest plan within this limit: add or change one move; go on from what is faster and holds."""
    chance = random.Random(state.problem.seed)
    tried: set[tuple[Choice, ...]] = set()
    for _ in range(REFINEMENTS):
        good = [point for point in state.points.values() if point.loss <= limit]
        if state.is_over or not good or not moves:
            return
        best = min(good, key=lambda point: (point.predicted, str(point.choices)))
        options = [kept for kept in _neighbours(best, moves, chance, state.problem.slot) if kept not in tried]
        if not options:
            return
        tried.add(options[0])
        state.evaluate(options[0])


def _neighbours(best: Point, moves: Sequence[Move], chance: random.Random, slot: Callable[[Choice], Hashable]) -> list[tuple[Choice, ...]]:
    """Plans one step from this one, most seconds saved per drift first: a further move, or a stronger one in the place of a weaker."""
    taken = {slot(choice): choice for choice in best.choices}
    known = {move.choice: move for move in moves}
    whole = {(choice.rule, choice.site) for choice in best.choices}  # a rule that acts on the whole model has no place left in it
    steps = []
    for move in moves:
        before = taken.get(slot(move.choice))
        if move.choice.site != MODEL and (move.choice.rule, MODEL) in whole:
            continue
        if before == move.choice or (before in known and move.saved <= known[before].saved):
            continue
        kept = tuple(choice for choice in best.choices if choice != before)
        if move.choice.site == MODEL:
            kept = tuple(choice for choice in kept if choice.rule != move.choice.rule)
        gain = _gain(known.get(before) if before is not None else None, move)
        steps.append((gain * chance.uniform(0.5, 1.0), str(move.choice), (*kept, move.choice)))
    return [choices for *_, choices in sorted(steps, key=lambda step: step[:2], reverse=True)]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in both predicted seconds and loss, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.predicted, p.loss, len(p.choices))):
        if not best or point.loss < best[-1].loss:
            best.append(replace(point))
    return best
