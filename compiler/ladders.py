"""Ladders: plans from harmless to reckless, of which a search looks for the highest rung that a budget allows; and the plans one step from a plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from statistics import median

from paretorch.moves import Move
from paretorch.plan import Choice
from paretorch.problem import Point
from paretorch.rewrites.rule import MODEL

LEADS = (0.0, 1.5, -1.5)  # values of a knob by which the first place of a ladder is ahead of the middle one


def greedy(start: tuple[Choice, ...], moves: Iterable[Move], slot: Callable[[Choice], Hashable]) -> list[tuple[Choice, ...]]:
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


def shaped(start: tuple[Choice, ...], moves: Iterable[Move]) -> list[list[tuple[Choice, ...]]]:
    """Ladders of one kin each over all its places, first of those that save most at a drift that all can have: for each kin one that raises them
    evenly, one with stronger values at the first places, and one with stronger values at the last.

    What choices do alone says little of what they do together where all draw on the same store, as tokens that can be spared. Small steps
    everywhere do not overdraw it at any one place.
    """
    kins: dict[Hashable, dict[str, list[Move]]] = {}
    for move in moves:
        kins.setdefault(move.kin, {}).setdefault(move.choice.site, []).append(move)
    several = [list(places.values()) for places in kins.values() if len(places) > 1]
    sums = [_even_sums(places) for places in several]
    common = median(row[len(row) // 2][1] for row in sums) if sums else 0.0
    saved = [max((seconds for seconds, drift in row if drift <= common), default=0.0) for row in sums]
    order = sorted(range(len(several)), key=lambda number: (-saved[number], str(several[number][0][0].choice)))
    return [_raised(start, several[number], lead) for number in order for lead in LEADS]


def _even_sums(places: Sequence[Sequence[Move]]) -> list[tuple[float, float]]:
    """(seconds saved, drift), added up over all places, of each level of a kin."""
    levels = [[values[min(level, len(values) - 1)] for values in places] for level in range(max(map(len, places)))]
    return [(sum(move.saved for move in moves), sum(move.drift for move in moves)) for moves in levels]


def _raised(start: tuple[Choice, ...], places: Sequence[Sequence[Move]], lead: float) -> list[tuple[Choice, ...]]:
    """Rungs on which one place after the other gets its next value; the first place is `lead` values ahead of the middle one, the last behind."""
    steps = []
    for number, values in enumerate(places):
        ahead = lead * (1 - 2 * number / (len(places) - 1))
        for level, move in enumerate(values):
            gain = _gain(values[level - 1] if level else None, move)
            steps.append((level - ahead, -gain, number, move.choice))
    taken: dict[int, Choice] = {}
    rungs = []
    for *_, number, choice in sorted(steps, key=lambda step: step[:3]):
        taken[number] = choice
        rungs.append((*taken.values(), *start))
    return rungs


def neighbours(best: Point, moves: Sequence[Move], chance: random.Random, slot: Callable[[Choice], Hashable]) -> list[tuple[Choice, ...]]:
    """Plans one step from this one, most seconds saved per drift first: a further move, a stronger one in the place of a weaker, or a stronger one
    for a weaker one at another place of its kin, where that saves seconds."""
    taken = {slot(choice): choice for choice in best.choices}
    known = {move.choice: move for move in moves}
    whole = {(choice.rule, choice.site) for choice in best.choices}  # a rule that acts on the whole model has no place left in it
    swaps = _Swaps(moves, [known[choice] for choice in best.choices if choice in known])
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
        old = known.get(before) if before is not None else None
        steps.append((_gain(old, move) * chance.uniform(0.5, 1.0), str(move.choice), (*kept, move.choice)))
        for gain, given, choices in swaps.of(old, move, kept):
            steps.append((gain * chance.uniform(0.5, 1.0), f"{move.choice} for {given}", choices))
    return [choices for *_, choices in sorted(steps, key=lambda step: step[:2], reverse=True)]


class _Swaps:
    """Stronger moves that are paid for by the next weaker value at another place of their kin, or by none there."""

    def __init__(self, moves: Iterable[Move], taken: Iterable[Move]) -> None:
        self._values: dict[tuple[Hashable, str], list[Move]] = {}
        self._taken: dict[Hashable, list[Move]] = {}
        for move in moves:
            self._values.setdefault((move.kin, move.choice.site), []).append(move)
        for move in taken:
            self._taken.setdefault(move.kin, []).append(move)

    def of(self, old: Move | None, new: Move, kept: tuple[Choice, ...]) -> Iterator[tuple[float, Choice, tuple[Choice, ...]]]:
        """(seconds saved per drift, what is weakened, choices) of those that save seconds. old: what the new move replaces; kept: the others."""
        saved, drift = new.saved - (old.saved if old else 0.0), new.drift - (old.drift if old else 0.0)
        for other in self._taken.get(new.kin, ()):
            weaker = (move for move in self._values[other.kin, other.choice.site] if move.saved < other.saved)
            less = max(weaker, key=lambda move: move.saved, default=None)
            given = other.saved - (less.saved if less else 0.0)
            if other.choice in kept and saved > given:
                rest = tuple(choice for choice in kept if choice != other.choice)
                gain = (saved - given) / max(drift - other.drift + (less.drift if less else 0.0), 1e-9)
                yield gain, other.choice, (*rest, new.choice, *([less.choice] if less else []))
