"""Schedules that were chosen, kept on disk: one JSON file for each device, so that no kernel is timed twice on it.

An entry stands under a digest of the kernel's text without its schedule, the class of its sizes, and the candidates; its file under the device's name
and architecture. What was chosen with another version of triton, or is damaged, is void: a note says so, and the next choice replaces the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paretorch.codegen.kernel import Schedule

FORMAT = 1  # raised when what an entry holds, or what its key is made of, changes
TIMED, FILTERED = "timed", "static model"


@dataclass(frozen=True)
class Choice:
    """by: TIMED or FILTERED; seconds: of each candidate that was timed, by its text."""

    kernel: str
    schedule: Schedule
    by: str
    seconds: dict[str, float] = field(default_factory=dict)


class ScheduleCache:
    """Choices for one device. folder: None keeps them in memory only; notes: gets a sentence where the file cannot be read or written."""

    def __init__(self, device: str, arch: str, folder: Path | None = None, notes: list[str] | None = None) -> None:
        self.marks = {"format": FORMAT, "device": device, "arch": arch, "triton": triton_version()}
        digest = hashlib.sha256(f"{device} {arch}".encode()).hexdigest()[:16]
        self.path = folder / f"schedules-{digest}.json" if folder is not None else None
        self.notes = notes if notes is not None else []
        self._choices: dict[str, Choice] | None = None

    def get(self, key: str) -> Choice | None:
        """The choice under this key."""
        if self._choices is None:
            self._choices = self._read()
        return self._choices.get(key)

    def put(self, choices: dict[str, Choice]) -> None:
        """Keep these, and write the file whole or not at all, with what other processes added to it since."""
        self._choices = {**(self._choices or {}), **choices}
        if self.path is None:
            return
        self._choices = {**self._read(), **self._choices}
        rows = {key: vars(choice) for key, choice in self._choices.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = self.path.with_suffix(f".{os.getpid()}")
            half.write_text(json.dumps({"marks": self.marks, "choices": rows}, indent=1, sort_keys=True))
            half.replace(self.path)
        except OSError as error:
            self._note(f"schedules are not kept for later calls: {error}")
            self.path = None

    def _read(self) -> dict[str, Choice]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            kept = json.loads(self.path.read_text())
            if kept["marks"] != self.marks:
                self._note(f"{self.path} is of {_shown(kept['marks'])}, not of {_shown(self.marks)}: schedules are chosen anew")
                return {}
            return {str(key): _choice(row) for key, row in kept["choices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._note(f"{self.path} is damaged ({type(error).__name__}: {error}): schedules are chosen anew")
            return {}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _choice(row: dict[str, Any]) -> Choice:
    """Raises ValueError, KeyError or TypeError for what is no choice."""
    schedule = {str(name): value for name, value in row["schedule"].items()}
    if not all(type(value) is int and value > 0 for value in schedule.values()) or "num_warps" not in schedule:
        raise ValueError(f"{schedule} is no schedule")
    return Choice(str(row["kernel"]), schedule, str(row["by"]), {str(name): float(value) for name, value in row["seconds"].items()})


def _shown(marks: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in marks.items())


def triton_version() -> str:
    """Of the package that compiles kernels; "absent" without it."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "absent"
