"""The report: predicted and measured side by side, what was applied, what was refused and why. Prints as tables, saves as JSON and HTML."""

from __future__ import annotations

import io
import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from paretorch.cost_model.measure import ratio
from paretorch.cost_model.quality import Drop
from paretorch.fusion import RUNTIME
from paretorch.ir.ops import is_op
from paretorch.ir.protocols import Measurement
from paretorch.ledger import Entry

if TYPE_CHECKING:
    from paretorch.contest import Contender
    from paretorch.plan import Plan
    from paretorch.session import Session

WIDTH = 110


@dataclass(frozen=True)
class Timing:
    """One row of the race. relative: seconds of the original over these, with the 95 % interval of that ratio."""

    name: str
    seconds: float
    spread: float
    rounds: int
    relative: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """seconds are of one call on the example inputs; measured_seconds and original_seconds come from the same race, None if not measured."""

    target: str
    runtime: str
    predicted_seconds: float | None
    measured_seconds: float | None
    original_seconds: float | None
    peak_memory_bytes: int | None
    unit: str
    limit: float | None
    loss: float | None
    half_width: float | None
    samples: int | None
    attention: int
    plan_lines: tuple[str, ...]
    timings: tuple[Timing, ...] = ()
    entries: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, plan: Plan, contender: Contender | None, drop: Drop | None, measured: dict[str, Measurement]) -> Report:
        """Gather what the session knows about the outcome."""
        graph = contender.graph if contender is not None else session.normalized
        mine = measured.get(contender.label) if contender is not None else measured.get("original")
        original = measured.get("original")
        return cls(
            target=str(session.target),
            runtime=plan.runtime,
            predicted_seconds=contender.predicted if contender is not None else None,
            measured_seconds=mine.seconds if mine else None,
            original_seconds=original.seconds if original else None,
            peak_memory_bytes=session.prices.peak_memory(graph),
            unit=session.budget.unit if session.budget.limit is not None else "",
            limit=session.budget.limit,
            loss=drop.mean if drop else None,
            half_width=drop.half_width if drop else None,
            samples=drop.n if drop else None,
            attention=sum(is_op(node, "attention") for node in session.normalized.calls),
            plan_lines=(*str(plan).splitlines()[1:], *_regions(session, contender)),
            timings=_timings(measured),
            entries=tuple(session.ledger),
            notes=_notes(session),
            stages=dict(session.stages.seconds),
            environment={"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
        )

    def after(self, session: Session) -> Report:
        """The same outcome with what the session has learnt since: verdicts, notes, seconds by stage."""
        return replace(self, entries=tuple(session.ledger), notes=_notes(session), stages=dict(session.stages.seconds))

    @property
    def speedup(self) -> float | None:
        """Measured seconds of the original over measured seconds; None if nothing was measured."""
        if self.measured_seconds is None or self.original_seconds is None:
            return None
        return self.original_seconds / self.measured_seconds

    def sentence(self) -> str:
        """The promise of the project, in one line."""
        if self.speedup is None or self.measured_seconds is None:
            predicted = "unknown" if self.predicted_seconds is None else f"{self.predicted_seconds * 1e3:.3f} ms"
            return f"predicted {predicted} on {self.target}; not measured" + self._lost()
        assert self.original_seconds is not None  # speedup is known
        parts = [f"measured {self.speedup:.2f}x ({self.original_seconds * 1e3:.2f} ms to {self.measured_seconds * 1e3:.2f} ms)"]
        if self.predicted_seconds is not None:
            parts.insert(0, f"predicted {self.original_seconds / self.predicted_seconds:.2f}x")
        return ", ".join(parts) + f" with {self.runtime}" + self._lost()

    def _lost(self) -> str:
        """What was lost on held-out data, as the end of the sentence; empty for an exact plan."""
        if self.loss is None or self.half_width is None:
            return ""
        return f"; {self.unit} {self.loss:.4f} (held out, n = {self.samples:,}, 95% interval ±{self.half_width:.4f})"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
        console.print(self._tables())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page. Raises ArtifactError if the path cannot be written."""
        from paretorch.artifact import write_text

        console = Console(file=io.StringIO(), width=WIDTH, record=True)
        console.print(self._tables())
        write_text(Path(path), console.export_html(inline_styles=True))

    def _tables(self) -> Group:
        parts: list[Any] = [Text(self.sentence()), Text("")]
        parts += [Text("plan"), *(Text(line) for line in self.plan_lines), Text("")]
        if self.timings:
            parts += [_timing_table(self.timings)]
        parts += [_ledger_table(self.entries)]
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        parts += [Text(f"attention recognised: {self.attention} sites"), Text(f"seconds by stage: {stages}")]
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)


def _regions(session: Session, contender: Contender | None) -> tuple[str, ...]:
    """What runs as one generated kernel, if that is how the outcome runs."""
    if contender is None or contender.runtime != RUNTIME:
        return ()
    return tuple(f"  {line}" for line in str(session.fusion.plan(contender.graph)).splitlines())


def _notes(session: Session) -> tuple[str, ...]:
    failures = (f"{name}: {why}" for name, why in session.lowering.failures.items())
    return (*session.program.notes, *session.notes, *failures)


def _timings(measured: dict[str, Measurement]) -> tuple[Timing, ...]:
    original = measured.get("original")
    rows = []
    for name, found in sorted(measured.items(), key=lambda item: item[1].seconds):
        against = ratio(original, found) if original is not None else None
        value, low, high = (against.value, against.low, against.high) if against is not None else (1.0, 1.0, 1.0)
        rows.append(Timing(name, found.seconds, found.spread, found.rounds, value, low, high))
    return tuple(rows)


def _timing_table(timings: tuple[Timing, ...]) -> Table:
    table = Table("contender", "ms", "times faster", "95% interval", "rounds", title="measured side by side", title_justify="left")
    for row in timings:
        table.add_row(row.name, f"{row.seconds * 1e3:.2f}", f"{row.relative:.2f}", f"{row.low:.2f} to {row.high:.2f}", str(row.rounds))
    return table


def _ledger_table(entries: tuple[Entry, ...]) -> Table:
    """A row per rule and verdict, with the number of sites and one reason as an example."""
    table = Table("rule", "verdict", "sites", "saves, ms", "reason", title="what was offered", title_justify="left")
    counts = Counter((entry.rule, entry.verdict) for entry in entries)
    for (rule, verdict), count in counts.items():
        group = [entry for entry in entries if (entry.rule, entry.verdict) == (rule, verdict)]
        saved = sum(entry.seconds_saved or 0.0 for entry in group)
        reason = next((entry.reason for entry in group if entry.reason), "")
        table.add_row(rule, verdict, str(count), f"{saved * 1e3:.2f}" if saved else "", reason)
    return table
