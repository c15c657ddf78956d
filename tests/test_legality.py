"""The legality matrix of docs/legality.md: a seeded tenth of the architectures on every run, all of them, and the page, with --slow."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from paretorch.rewrites import RULES
from tests.architectures import NAMES
from tests.legality import Row, row

PAGE = Path(__file__).parent.parent / "docs" / "legality.md"
SEED = 7
TENTH = sorted(random.Random(SEED).sample(NAMES, len(NAMES) // 10), key=NAMES.index)
ROWS: dict[str, Row] = {}


@pytest.mark.parametrize("name", [name if name in TENTH else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_every_cell_keeps_its_contract(name: str) -> None:
    found = ROWS[name] = row(name)
    assert found.missing or [cell.rule.name for cell in found.cells] == [rule.name for rule in RULES]
    assert not found.all_faults, "\n".join(found.all_faults)


@pytest.mark.slow
def test_the_page() -> None:
    if set(ROWS) != set(NAMES):
        pytest.skip("the page is written when every row was found in this run")
    PAGE.write_text(page(ROWS[name] for name in NAMES))


def page(rows: Iterable[Row]) -> str:
    """The matrix and, below it, every sentence."""
    rows = list(rows)
    captured = [found for found in rows if not found.missing]
    cells = [cell for found in captured for cell in found.cells]
    lines = [
        "# Where every rule is legal",
        "",
        "Written by `pytest --slow tests/test_legality.py`; do not edit. Every cell was found by doing it: the architecture is captured,",
        "normalized and analyzed, and the rule asked for its places. `2/3`: legal at two of three places, refused at one; `·`: no place that",
        "the rule is about. What is legal was applied, and held against its contract: exact rules give the same outputs (1e-4 relative, f32);",
        "lossy ones are bit-identical at the low end of their knob and, at the weakest and strongest values and everywhere at once, give a",
        "graph that verifies, runs, keeps shapes and types, stays finite, and (in f64) keeps the rows of a batch independent of each other.",
        'Models with "any" batch were captured so and run at batches of 1, 2 and 7. All models have random weights: this is about legality,',
        "not about quality.",
        "",
        f"{len(rows)} architectures, {len(captured)} captured; {len(cells)} cells, of which {sum(1 for c in cells if c.places)} apply somewhere,",
        f"{sum(1 for c in cells if c.refused and not c.places)} are refused with the sentences below, and",
        f"{sum(1 for c in cells if not c.refused and not c.places)} have no place for the rule.",
    ]
    for title, is_exact in (("Lossy rules", False), ("Exact rules", True)):
        rules = [rule for rule in RULES if rule.is_exact == is_exact]
        lines += ["", f"## {title}", "", "| architecture | batch | " + " | ".join(rule.name for rule in rules) + " |"]
        lines.append("|---" * (len(rules) + 2) + "|")
        for found in rows:
            marks = [str(cell) for cell in found.cells if cell.rule in rules] or ["not captured", *[""] * (len(rules) - 1)]
            lines.append(f"| {found.name} | {'' if found.missing else found.batches} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", "## Sentences", *(line for found in rows for line in sentences(found))]) + "\n"


def sentences(found: Row) -> list[str]:
    """What was refused on one architecture; of one rule's sentences those that differ, and how often each was said."""
    lines = ["", f"### {found.name}", ""]
    if found.missing:
        return [*lines, f"Not captured: {found.missing}"]
    for cell in found.cells:
        lines += [f"- `{cell.rule.name}`{f' ({count} times)' if count > 1 else ''}: {reason}" for reason, count in cell.refused.items()]
    return lines if len(lines) > 3 else [*lines, "Nothing was refused."]
