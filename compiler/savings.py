"""What each candidate is predicted to save, from as few prices as carry it: applying a rewrite takes longer than pricing the result.

Of many knob values the first, the middle and the last are priced; of equal sites in repeated layers likewise, on a graph with few of these layers.
In between, savings are a line in the number of equal sites that follow: exact for a layer left out, and close for tokens merged, which save in each
layer that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from paretorch.ir.errors import ParetorchError
from paretorch.plan import Choice, Knob
from paretorch.rewrites.apply import Candidate
from paretorch.rewrites.rule import level

FEWEST = 4  # sites or values of which some are not priced
Row = list[tuple[Knob, float]]


@dataclass(frozen=True)
class Pricing:
    """Predicted seconds that one choice saves, which raise ParetorchError: on the whole graph, and on one with fewer layers, where the site is in it.

    alike: equal for candidates at equal places of repeated layers.
    """

    alike: Callable[[Candidate], Hashable]
    saved: Callable[[Choice], float]
    saved_in_short: Callable[[Choice], float]
    is_in_short: Callable[[Candidate], bool]


class Savings:
    """Savings of candidates, priced when they are asked for."""

    def __init__(self, candidates: Sequence[Candidate], pricing: Pricing) -> None:
        self._pricing = pricing
        self._groups: dict[Hashable, list[Candidate]] = {}
        self._keys = {id(candidate): (candidate.rule.name, levels(candidate), pricing.alike(candidate)) for candidate in candidates}
        for candidate in candidates:
            self._groups.setdefault(self._keys[id(candidate)], []).append(candidate)
        self._lines: dict[Hashable, dict[int, Row] | None] = {}

    def of(self, candidate: Candidate) -> tuple[Row, str]:
        """((knob, seconds saved) weaker first, reason): the values from the first that can be applied to the last; the reason if none can."""
        key = self._keys[id(candidate)]
        group = self._groups[key]
        if key not in self._lines:
            self._lines[key] = self._line(group)
        line = self._lines[key]
        if line is None:
            return _priced(candidate, self._pricing.saved)
        following = len(group) - 1 - group.index(candidate)
        places = sorted(line)
        right = next((place for place in places[1:] if place >= following), places[-1])
        left = places[places.index(right) - 1]
        share = (following - left) / (right - left)
        own = dict(zip(levels(candidate), candidate.knobs, strict=True))
        return [(own[level(knob)], low + share * (high - low)) for (knob, low), (_, high) in zip(line[left], line[right], strict=True)], ""

    def _line(self, group: Sequence[Candidate]) -> dict[int, Row] | None:
        """Savings of some of these sites, by the number of sites that follow in the short graph; None if they are too few, or not alike after all."""
        kept = [candidate for candidate in group if self._pricing.is_in_short(candidate)]
        if len(group) < FEWEST or len(kept) < FEWEST:
            return None
        rows = {len(kept) - 1 - place: _priced(kept[place], self._pricing.saved_in_short)[0] for place in _some(len(kept))}
        kinds = {tuple(level(knob) for knob, _ in row) for row in rows.values()}
        return rows if len(kinds) == 1 and () not in kinds else None


def levels(candidate: Candidate) -> tuple[Knob, ...]:
    """What its values have in common with those of the same rule at other places."""
    return tuple(level(knob) for knob in candidate.knobs)


def _priced(candidate: Candidate, saved: Callable[[Choice], float]) -> tuple[Row, str]:
    knobs, reason = candidate.knobs, ""
    are_numbers = all(isinstance(number, (int, float)) for number in levels(candidate))
    priced: dict[int, float] = {}
    for place in _some(len(knobs)) if len(knobs) >= FEWEST and are_numbers else range(len(knobs)):
        try:
            priced[place] = saved(Choice(candidate.rule.name, candidate.site.name, knobs[place]))
        except ParetorchError as error:
            reason = str(error).splitlines()[0]
    return _between(priced, knobs), reason


def _some(count: int) -> tuple[int, ...]:
    """The first, the middle and the last place."""
    return 0, (count - 1) // 2, count - 1


def _between(priced: dict[int, float], knobs: Sequence[Knob]) -> Row:
    """(knob, saving) of the values from the first priced to the last, linear between those that were."""
    places, numbers = sorted(priced), [level(knob) for knob in knobs]
    found = []
    for place, knob in enumerate(knobs):
        left, right = max((p for p in places if p <= place), default=None), min((p for p in places if p >= place), default=None)
        if left is None or right is None:
            continue
        share = (float(numbers[place]) - float(numbers[left])) / (float(numbers[right]) - float(numbers[left])) if right > left else 0.0  # type: ignore[arg-type]
        found.append((knob, priced[left] + share * (priced[right] - priced[left])))
    return found
