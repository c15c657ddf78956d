"""What each candidate is predicted to save, from as few prices as carry it: applying a rewrite takes longer than pricing the result.

Of many knob values the first, the middle and the last are priced; of equal sites in repeated layers likewise. Between them savings are a line: exact
for a layer left out, and close for tokens merged, which save in each layer that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from paretorch.ir.errors import ParetorchError
from paretorch.plan import Choice, Knob
from paretorch.rewrites.apply import Candidate

FEWEST = 4  # sites or values of which some are not priced
Row = list[tuple[Knob, float]]


class Savings:
    """Savings of candidates, priced when they are asked for. saved: predicted seconds that one choice saves; raises ParetorchError."""

    def __init__(self, candidates: Sequence[Candidate], alike: Callable[[Candidate], Hashable], saved: Callable[[Choice], float]) -> None:
        self._saved = saved
        self._groups: dict[Hashable, list[Candidate]] = {}
        self._keys = {id(candidate): (candidate.rule.name, candidate.knobs, alike(candidate)) for candidate in candidates}
        for candidate in candidates:
            self._groups.setdefault(self._keys[id(candidate)], []).append(candidate)
        self._priced: dict[int, tuple[Row, str]] = {}

    def of(self, candidate: Candidate) -> tuple[Row, str]:
        """((knob, seconds saved) weaker first, reason): the values from the first that can be applied to the last; the reason if none can."""
        group = self._groups[self._keys[id(candidate)]]
        rows = {place: self._row(group[place]) for place in _some(len(group))} if len(group) >= FEWEST else {}
        place = group.index(candidate)
        if not rows or place in rows or len({tuple(knob for knob, _ in row) for row, _ in rows.values()}) > 1:
            return self._row(candidate)
        left, right = max(p for p in rows if p < place), min(p for p in rows if p > place)
        share = (place - left) / (right - left)
        between = zip(rows[left][0], rows[right][0], strict=True)
        return [(knob, low + share * (high - low)) for (knob, low), (_, high) in between], rows[left][1]

    def _row(self, candidate: Candidate) -> tuple[Row, str]:
        if id(candidate) not in self._priced:
            self._priced[id(candidate)] = self._price(candidate)
        return self._priced[id(candidate)]

    def _price(self, candidate: Candidate) -> tuple[Row, str]:
        knobs, reason = candidate.knobs, ""
        are_numbers = all(isinstance(knob, (int, float)) for knob in knobs)
        priced: dict[int, float] = {}
        for place in _some(len(knobs)) if len(knobs) >= FEWEST and are_numbers else range(len(knobs)):
            try:
                priced[place] = self._saved(Choice(candidate.rule.name, candidate.site.name, knobs[place]))
            except ParetorchError as error:
                reason = str(error).splitlines()[0]
        return _between(priced, knobs), reason


def _some(count: int) -> tuple[int, ...]:
    """The first, the middle and the last place."""
    return 0, (count - 1) // 2, count - 1


def _between(priced: dict[int, float], knobs: Sequence[Knob]) -> Row:
    """(knob, saving) of the values from the first priced to the last, linear between those that were."""
    places = sorted(priced)
    found = []
    for place, knob in enumerate(knobs):
        left, right = max((p for p in places if p <= place), default=None), min((p for p in places if p >= place), default=None)
        if left is None or right is None:
            continue
        share = (float(knob) - float(knobs[left])) / (float(knobs[right]) - float(knobs[left])) if right > left else 0.0  # type: ignore[arg-type]
        found.append((knob, priced[left] + share * (priced[right] - priced[left])))
    return found
