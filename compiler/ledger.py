"""The ledger: what was offered, chosen, refused, and why. It drives the report and `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

VERDICTS = ("taken", "not taken", "priced out", "over budget", "in conflict", "illegal", "failed")


@dataclass(frozen=True)
class Entry:
    """One rule at one site. seconds_saved: predicted; drift: measured on the ranking part; reason: a sentence."""

    rule: str
    family: str
    site: str
    verdict: str
    reason: str = ""
    knob: int | float | str | None = None
    seconds_saved: float | None = None
    drift: float | None = None


@dataclass
class Ledger:
    """Entries in the order in which they were made; a later entry for the same rule and site replaces the earlier one."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        self.entries[entry.rule, entry.site] = entry

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def of(self, verdict: str) -> list[Entry]:
        return [entry for entry in self if entry.verdict == verdict]

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self]
