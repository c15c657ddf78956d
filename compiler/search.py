"""Selection: which lossy rewrites together save most seconds within the budget.

1. Each (rule, site) is applied alone; its drift is measured on a few ranking samples, its saving is predicted (`moves`).
2. A ladder is built: from nothing, the move with most seconds saved per drift is taken, again and again, so rungs go from exact to reckless.
3. Rungs are evaluated jointly on the ranking part, by bisection for each budget of interest, since single drifts only rank (sums were
   off by 0.54 to 1.65 on measured pairs).
4. Ladders of one rule at all its places, evenly raised or with a lead of the first or last ones, are climbed from where the fastest plan started: from
   the first rung that is faster than the best plan, so that one which leads nowhere costs a single evaluation.
5. The best plan found is refined by single steps and by swaps of two while evaluations and time are left.

Same candidates, same evidence, same seed: the same points, to the byte.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from paretorch.ir.errors import LoweringError, PlanError
from paretorch.ir.graph import Graph
from paretorch.ladders import LEADS, greedy, neighbours, shaped
from paretorch.moves import Move, measure_moves
from paretorch.plan import Choice
from paretorch.problem import ConflictError, Point, Problem
from paretorch.rewrites.rule import MODEL

SHAPED_LADDERS = 9
REFINEMENTS = 8
WIDE_SHARE = 0.2  # of the budget: what a rewrite of the whole model may lose to be part of every plan
BUDGET_SHARES = (1.0, 0.5, 0.25)  # the frontier is explored at these parts of the budget, for `choose`

Start = tuple[tuple[Choice, ...], list[Move]]  # what is in every plan of a ladder, and the moves that go with it


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
    moves = measure_moves(problem, base_seconds)
    wide = [move for move in moves if move.choice.site == MODEL]
    narrow = [move for move in moves if move.choice.site != MODEL]
    starts: list[Start] = [((), narrow)]
    starts += [((w.choice,), [m for m in narrow if m.choice.rule != w.choice.rule]) for w in wide]
    for start, usable in sorted(starts, key=lambda item: -len(item[0])):
        if not start and _is_dominated(state):
            continue
        rungs = [start, *greedy(start, usable, problem.slot)]
        state.evaluate(start)
        for share in BUDGET_SHARES:
            _bisect(state, rungs, share * problem.limit)
    start, usable = _best_start(state, starts)
    ladders = shaped(start, usable)
    for share in BUDGET_SHARES:
        for rungs in ladders[: SHAPED_LADDERS if share == 1 else len(LEADS)]:
            _climb(state, rungs, share * problem.limit)
        _refine(state, moves, share * problem.limit)


def _best_start(state: _State, starts: Sequence[Start]) -> Start:
    """Where the fastest plan within the budget began."""
    best = state.best(state.problem.limit)
    chosen = set(best.choices) if best is not None else set()
    return max((start for start in starts if chosen.issuperset(start[0])), key=lambda start: len(start[0]))


@dataclass
class _State:
    problem: Problem
    points: dict[tuple[Choice, ...], Point]
    broken: set[tuple[Choice, ...]] = field(default_factory=set)
    evaluations: int = 0

    @property
    def is_over(self) -> bool:
        return self.evaluations >= self.problem.max_evaluations or self.problem.stages.is_over

    def best(self, limit: float) -> Point | None:
        """The plan that is predicted to be fastest of those within this limit."""
        good = [point for point in self.points.values() if point.loss <= limit]
        return min(good, key=lambda point: (point.predicted, str(point.choices)), default=None)

    def is_faster(self, choices: tuple[Choice, ...], best: Point) -> bool:
        """Whether these choices, without those that do not go with the others, are predicted to be faster than this plan."""
        choices, graph = self._fitting(tuple(sorted(choices, key=str)))
        known = self.points.get(choices)
        if known is not None:
            return known.predicted < best.predicted
        return graph is not None and self.problem.price(graph)[0] < best.predicted

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


def _climb(state: _State, rungs: Sequence[tuple[Choice, ...]], limit: float) -> None:
    """From the first rung that is predicted to be faster than the best plan within this limit go up, in strides that double, while losses are
    within it; then bisect the last stride."""
    best = state.best(limit)
    low = bisect_left(range(len(rungs)), True, key=lambda place: best is None or state.is_faster(rungs[place], best))
    high, stride = low, 1
    while high < len(rungs) and not state.is_over:
        point = state.evaluate(rungs[high])
        if point is None or point.loss > limit:
            break
        low, high, stride = high + 1, high + stride, 2 * stride
    _bisect(state, rungs[low : min(high, len(rungs))], limit)


def _refine(state: _State, moves: Sequence[Move], limit: float) -> None:
    """From the fastest plan within this limit: add or change one move; go on from what is faster and holds."""
    chance = random.Random(state.problem.seed)
    tried: set[tuple[Choice, ...]] = set()
    for _ in range(REFINEMENTS):
        best = state.best(limit)
        if state.is_over or best is None or not moves:
            return
        options = [kept for kept in neighbours(best, moves, chance, state.problem.slot) if kept not in tried]
        if not options:
            return
        tried.add(options[0])
        state.evaluate(options[0])


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in both predicted seconds and loss, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.predicted, p.loss, len(p.choices))):
        if not best or point.loss < best[-1].loss:
            best.append(replace(point))
    return best
