"""Moves: what each lossy choice does alone, from few measurements.

Savings are predicted. Drift is measured at every place for the middle one of a knob's values, and at the first place of each kin for all of them: how
it grows from value to value is far from a line (merging padding costs nothing, merging past it nearly everything), and much alike from layer to layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from paretorch.plan import Choice, Knob
from paretorch.problem import Problem
from paretorch.rewrites.apply import Candidate
from paretorch.rewrites.rule import MODEL, level
from paretorch.savings import Pricing, Savings, levels

PROBE_SAMPLES = 16
GROUP = 8  # sites that are measured together, so that an executor has something to spread
SITES_SHARE = 0.5  # of the time left, in which sites are measured alone; the rest is for plans
LEAST_DRIFT = 1e-3  # of the most that a kin's values drift: what is less says nothing of how much more a stronger value does

Priced = list[tuple[Knob, float]]  # a knob's values with the seconds that they save


@dataclass(frozen=True)
class Move:
    """One lossy choice with what it does alone. saved: predicted seconds; drift: measured, or scaled from what was.

    kin: equal for moves of one rule that offers values of the same levels, whatever their place.
    """

    choice: Choice
    saved: float
    drift: float
    kin: Hashable = None

    @property
    def ratio(self) -> float:
        return self.saved / max(self.drift, 1e-9)


def measure_moves(problem: Problem, base_seconds: float) -> list[Move]:
    """Every candidate alone: predicted saving and drift of each knob value that saves time."""
    until = problem.stages.share_of_rest(SITES_SHARE)
    candidates = _in_turn(problem.candidates)
    moves: dict[int, list[Move]] = {}
    curves: dict[Hashable, dict[Knob, float]] = {}
    savings = Savings(problem.candidates, problem.pricing or _one_by_one(problem, base_seconds))
    for start in range(0, len(candidates), GROUP):
        problem.stages.tell("measure sites", start, len(candidates))
        if problem.stages.elapsed >= until:
            _leave_unmeasured(problem, candidates[start:])
            break
        group = [(c, knobs) for c in candidates[start : start + GROUP] if (knobs := _usable_knobs(problem, savings, c, base_seconds))]
        asked = [choice for candidate, knobs in group for choice in _to_measure(candidate, knobs, curves)]
        drifts = dict(zip(asked, problem.drifts(asked, PROBE_SAMPLES), strict=True))
        for candidate, knobs in group:
            moves[id(candidate)] = _moves(problem, candidate, knobs, drifts, curves[_kin(candidate)])
    return [move for candidate in problem.candidates for move in moves.get(id(candidate), ())]


def _kin(candidate: Candidate) -> Hashable:
    return candidate.rule.name, levels(candidate)


def _to_measure(candidate: Candidate, knobs: Priced, curves: dict[Hashable, dict[Knob, float]]) -> list[Choice]:
    """All values at the first place of its kin, which gets a curve by it; else the middle one."""
    is_first = _kin(candidate) not in curves
    curves.setdefault(_kin(candidate), {})
    return [_choice(candidate, knob) for knob, _ in (knobs if is_first else [_middle(knobs)])]


def _middle(knobs: Priced) -> tuple[Knob, float]:
    return knobs[len(knobs) // 2]


def _moves(
    problem: Problem, candidate: Candidate, knobs: Priced, drifts: dict[Choice, float | str], curve: dict[Knob, float]
) -> list[Move]:
    """A move for each value, none if the middle one cannot be run. What was measured at the first place of its kin is put into the curve."""
    middle, most = _middle(knobs)
    measured = {knob: drift for knob, _ in knobs if (drift := drifts.get(_choice(candidate, knob))) is not None}
    for knob, drift in measured.items():
        if isinstance(drift, str):
            problem.record("failed", _choice(candidate, knob), drift, dict(knobs)[knob], None)
        else:
            problem.evidence[f"drift {_choice(candidate, knob)}"] = drift
    known = {knob: drift for knob, drift in measured.items() if not isinstance(drift, str)}
    if middle not in known:
        return []
    if not curve:
        curve |= {level(knob): drift for knob, drift in known.items()}
    found = []
    for knob, saved in knobs:
        if isinstance(measured.get(knob), str):
            continue
        drift = known[knob] if knob in known else _scaled(known[middle], curve, level(middle), level(knob), saved / most)
        found.append(Move(_choice(candidate, knob), saved, drift, _kin(candidate)))
        problem.record("not taken", found[-1].choice, "other choices save more for the same loss", saved, drift)
    return found


def _scaled(drift: float, curve: dict[Knob, float], middle: Knob, knob: Knob, more: float) -> float:
    """The drift of one value from that of the middle one, as they relate on the curve; without it as they save seconds, `more` times as many."""
    if knob not in curve or middle not in curve:
        return drift * more
    least = LEAST_DRIFT * max(curve.values())
    return max(drift, least) * max(curve[knob], least, 1e-12) / max(curve[middle], least, 1e-12)


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


def _usable_knobs(problem: Problem, savings: Savings, candidate: Candidate, base_seconds: float) -> Priced:
    """(knob, predicted seconds saved) of the values that save time, weaker first."""
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
