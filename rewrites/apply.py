"""Applying rules: where they match, to a fixpoint, or one choice at one site. Everything that was refused comes back with its sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paretorch.ir.analyze import Facts, analyze
from paretorch.ir.errors import PlanError, RuleError
from paretorch.ir.graph import Graph
from paretorch.rewrites.rule import Knob, Refusal, Rule, Site

MOST_ROUNDS = 50  # of one rule over one graph; a rule that still finds something then does not terminate


@dataclass(frozen=True)
class Applied:
    """One rewrite that was made."""

    rule: str
    site: str


@dataclass(frozen=True)
class Candidate:
    """A legal lossy rewrite: knobs are its values beyond the identity."""

    rule: Rule
    site: Site
    knobs: tuple[Knob, ...]


def apply_rule(rule: Rule, graph: Graph, limit: int | None = None) -> tuple[Graph, list[Applied], list[Refusal]]:
    """An exact rule wherever it is legal, until it finds nothing more. limit: the most rewrites (fuel). Raises RuleError."""
    applied: list[Applied] = []
    refused: dict[str, Refusal] = {}
    for _ in range(MOST_ROUNDS):
        sites, refusals = sites_of(rule, graph)
        refused = {refusal.site: refusal for refusal in refusals}
        if not sites or (limit is not None and len(applied) >= limit):
            return graph, applied, list(refused.values())
        assert rule.rewrite is not None  # rules that are applied here have it
        for site in sites:
            if limit is not None and len(applied) >= limit:
                break
            if all(graph.node(name) is not None for name in site.name.split("+")):
                graph = rule.rewrite(graph, site, None)
                applied.append(Applied(rule.name, site.name))
    raise RuleError(f"{rule.name} still finds sites after {MOST_ROUNDS} rounds; its replacement must not match its own pattern")


def sites_of(rule: Rule, graph: Graph, facts: Facts | None = None) -> tuple[list[Site], list[Refusal]]:
    """(legal sites, refusals) of a rule on this graph."""
    assert rule.sites is not None  # every rule names its sites
    sites, refusals = [], []
    for found in rule.sites(graph, facts if facts is not None else analyze(graph)):
        (sites if isinstance(found, Site) else refusals).append(found)  # type: ignore[attr-defined]
    return sites, refusals


def apply_choice(rule: Rule, graph: Graph, site: str, knob: Knob) -> Graph:
    """One choice. Raises PlanError if the site is gone or no longer legal."""
    if rule.rewrite is None:
        raise PlanError(f"{rule.name} is a local rule; it is applied everywhere, not at one site")
    return rule.rewrite(graph, Site(site), knob)


def propose(graph: Graph, facts: Facts, rules: Iterable[Rule]) -> tuple[list[Candidate], list[Refusal]]:
    """Every legal site of every lossy rule, and every refusal."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for rule in rules:
        sites, refused = sites_of(rule, graph, facts)
        refusals += refused
        for site in sites:
            values = site.values if site.values is not None else rule.knobs
            candidates.append(Candidate(rule, site, tuple(value for value in values if value != rule.knobs[0])))
    return candidates, refusals
