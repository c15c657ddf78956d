"""Ladders: plans from harmless to reckless, of which a search looks for the highest rung that a budget allows; and the plans one step from a plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence

from paretorch.moves import Move
from paretorch.plan import Choice, Knob
from paretorch.problem import Point
from paretorch.rewrites.rule import MODEL


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


def even(start: tuple[Choice, ...], moves: Iterable[Move]) -> list[list[tuple[Choice, ...]]]:
    """Ladders of one kin each, that which saves most for its drift first: a rung gives one value to all its places.

    What choices do alone says little of what they do together where all draw on the same store, as tokens that can be spared. Small steps
    everywhere do not overdraw it at any one place.
    """
    kins: dict[Hashable, dict[Knob, list[Move]]] = {}
    for move in moves:
        kins.setdefault(move.kin, {}).setdefault(move.choice.knob, []).append(move)
    found = []
    for values in kins.values():
        rungs = sorted((together for together in values.values() if len(together) > 1), key=_saved)
        if rungs:
            middle = rungs[len(rungs) // 2]
            ratio = _saved(middle) / max(sum(move.drift for move in middle), 1e-9)
            found.append((ratio, [(*(move.choice for move in together), *start) for together in rungs]))
    return [ladder for _, ladder in sorted(found, key=lambda item: (-item[0], str(item[1][0])))]


def _saved(moves: Iterable[Move]) -> float:
    return sum(move.saved for move in moves)


def neighbours(best: Point, moves: Sequence[Move], chance: random.Random, slot: Callable[[Choice], Hashable]) -> list[tuple[Choice, ...]]:
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
