"""`explain`: the ledger as text, grouped by verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretorch.ledger import VERDICTS, Entry

if TYPE_CHECKING:
    from paretorch.report import Report


def explain(report: Report, rule: str | None = None) -> str:
    """One line per rule and site; `rule` keeps those of one rule or family."""
    entries = [entry for entry in report.entries if rule in (None, entry.rule, entry.family)]
    lines: list[str] = []
    for verdict in VERDICTS:
        found = [entry for entry in entries if entry.verdict == verdict]
        if found:
            lines += [f"{verdict} ({len(found)})", *(f"  {_line(entry)}" for entry in found)]
    lines += [f"note: {note}" for note in report.notes] if rule is None else []
    return "\n".join(lines) if lines else f"nothing was offered{f' by {rule}' if rule else ''}"


def _line(entry: Entry) -> str:
    parts = [f"{entry.rule} at {entry.site}" + ("" if entry.knob is None else f" = {entry.knob}")]
    if entry.seconds_saved is not None:
        parts.append(f"saves {entry.seconds_saved * 1e3:.3f} ms (predicted)")
    if entry.drift is not None:
        parts.append(f"drift {entry.drift:.4g} alone")
    if entry.reason:
        parts.append(entry.reason)
    return "; ".join(parts)
