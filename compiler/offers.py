"""What every rule offers on a model, without applying, measuring or searching anything: for `paretorch why`."""

from __future__ import annotations

from typing import Any

from paretorch.capture import capture
from paretorch.cost_model.devices import Target
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import ParetorchError
from paretorch.ledger import Entry
from paretorch.report import Report
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_rule, propose
from paretorch.rewrites.normalize import normalize


def offers(model: Any, example_inputs: Any, *, target: str = "cpu") -> Report:
    """A report that has only entries: "taken" for exact rules that apply, "not taken" for lossy ones that could, "illegal" otherwise."""
    graph = normalize(capture(model, example_inputs).graph)
    entries: list[Entry] = []
    for rule in RULES:
        if rule.is_exact:
            try:
                after, applied, refusals = apply_rule(rule, graph)
            except ParetorchError as error:
                entries.append(Entry(rule.name, rule.family, "everywhere", "failed", str(error)))
                continue
            entries += [Entry(rule.name, rule.family, step.site, "taken") for step in applied]
            entries += [Entry(rule.name, rule.family, refusal.site, "illegal", refusal.reason) for refusal in refusals]
            graph = after
    lossy = tuple(rule for rule in RULES if not rule.is_exact)
    candidates, refusals = propose(graph, analyze(graph), lossy)
    families = {rule.name: rule.family for rule in lossy}
    reason = "legal; needs a budget and data"
    entries += [Entry(c.rule.name, c.rule.family, c.site.name, "not taken", f"{reason}; knob values {list(c.knobs)}") for c in candidates]
    entries += [Entry(r.rule, families.get(r.rule, ""), r.site, "illegal", r.reason) for r in refusals]
    empty = dict.fromkeys(
        ("predicted_seconds", "measured_seconds", "original_seconds", "peak_memory_bytes", "limit", "loss", "half_width", "samples")
    )
    return Report(target=str(Target.parse(target)), runtime="", unit="", attention=0, plan_lines=(), entries=tuple(entries), **empty)  # type: ignore[arg-type]
