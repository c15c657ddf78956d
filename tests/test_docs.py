"""What the documents list is what there is."""

import re
from pathlib import Path

from paretorch.rewrites import RULES
from paretorch.rewrites.rule import FAMILIES, Rule

ROOT = Path(__file__).resolve().parents[1]


def listed(text: str) -> list[tuple[str, str, str]]:
    """(family, rule, row) of each row of the tables, by the heading that they stand under."""
    rows, heading = [], ""
    for line in text.splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        found = re.match(r"\| `(\w+)` \|", line)
        if found is not None:
            rows.append((heading, found[1], line))
    return rows


def kind_of(rule: Rule) -> str:
    return f"{rule.family}: {'exact' if rule.is_exact else 'lossy'}"


def test_every_rule_is_listed_in_the_order_in_which_it_is_offered() -> None:
    rows = listed((ROOT / "docs" / "rules.md").read_text())
    assert [name for _, name, _ in rows] == [rule.name for rule in RULES]
    for rule, (heading, _, row) in zip(RULES, rows, strict=True):
        assert heading.startswith(kind_of(rule)), rule.name
        assert rule.source.removeprefix("arXiv:") in row, rule.name
        if not rule.is_exact:
            assert f"`{rule.effect.knob}`" in heading + row, rule.name


def test_the_readme_names_every_family() -> None:
    text = (ROOT / "README.md").read_text()
    assert [family for family in FAMILIES if f"`{family}`" not in text] == []


def test_every_file_that_a_document_links_to_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
