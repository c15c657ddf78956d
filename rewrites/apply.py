"""Applying rules: where they match, to a fixpoint, or one choice at one site. Everything that was refused comes back with its sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts, analyze
from paretorch.ir.analyze.facts import AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError, RuleError
from paretorch.ir.graph import Graph, origin_of, type_of
from paretorch.ir.verify import verify
from paretorch.rewrites.match import Match, Miss, match_at, matches, record
from paretorch.rewrites.rule import Knob, Refusal, Rule, Site

MOST_ROUNDS = 50  # of one rule over one graph; a rule that still finds something then does not terminate
NO_FACTS = Facts(AxisFacts({}, ()))
_pattern = cache(record)


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
    """An exact rule wherever it is legal, until it finds nothing more. limit: the most rewrites (fuel). Raises RuleError, VerifyError."""
    applied: list[Applied] = []
    for _ in range(MOST_ROUNDS):
        sites, refusals = sites_of(rule, graph)
        if not sites or (limit is not None and len(applied) >= limit):
            return graph, applied, refusals
        draft = graph.draft()
        for site in sites:
            if limit is not None and len(applied) >= limit:
                break
            before = draft.edits
            if not _missing(draft, site) and _rewritten(rule, draft, site).edits > before:
                applied.append(Applied(rule.name, site.name))
        graph = draft.settled()
        verify(graph, rule.name)
    raise RuleError(f"{rule.name} still finds sites after {MOST_ROUNDS} rounds; its replacement must not match its own pattern")


def sites_of(rule: Rule, graph: Graph, facts: Facts | None = None) -> tuple[list[Site], list[Refusal]]:
    """(legal sites, refusals) of a rule on this graph, in order of the graph. facts: analyzed here for a lossy rule if None."""
    if rule.pattern is not None:
        return _local_sites(rule, graph)
    assert rule.sites is not None  # a rule without a pattern names its sites
    if facts is None:
        facts = NO_FACTS if rule.is_exact else analyze(graph)
    found = list(rule.sites(graph, facts))
    return [site for site in found if isinstance(site, Site)], [refusal for refusal in found if isinstance(refusal, Refusal)]


def apply_choice(rule: Rule, graph: Graph, site: str, knob: Knob) -> Graph:
    """One choice. Raises PlanError if the site is gone or no longer legal, VerifyError."""
    after = _chosen(rule, graph, site, knob)
    verify(after, rule.name)
    return after


def _chosen(rule: Rule, graph: Graph, site: str, knob: Knob) -> Graph:
    if not rule.is_exact:
        assert rule.rewrite is not None  # a lossy rule has no local pattern
        return rule.rewrite(graph, Site(site), knob)
    sites, refusals = sites_of(rule, graph)
    if site not in {legal.name for legal in sites}:
        reason = next((refusal.reason for refusal in refusals if refusal.site == site), "the graph has no such place, or no longer")
        raise PlanError(f"{rule.name} cannot act at {site}: {reason}")
    return _rewritten(rule, graph, Site(site))


def propose(graph: Graph, facts: Facts, rules: Iterable[Rule]) -> tuple[list[Candidate], list[Refusal]]:
    """Every legal site of every lossy rule, and every refusal."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for rule in rules:
        sites, refused = sites_of(rule, graph, facts)
        refusals += refused
        for site in sites:
            candidates.append(_candidate(rule, site))
    return candidates, refusals


def _candidate(rule: Rule, site: Site) -> Candidate:
    values = site.values if site.values is not None else rule.knobs
    return Candidate(rule, site, tuple(value for value in values if value != rule.knobs[0]))


def calibrated(candidates: Iterable[Candidate], graph: Graph, batches: Sequence[Sequence[Tensor]]) -> list[Candidate]:
    """The candidates on this graph, those of rules that measure their values with values for these inputs. batches: of its flat inputs."""
    known = list(candidates)
    for rule in dict.fromkeys(candidate.rule for candidate in known):
        if rule.calibrate is None:
            continue
        own = [place for place, candidate in enumerate(known) if candidate.rule is rule]
        for place, site in zip(own, rule.calibrate(graph, [known[place].site for place in own], batches), strict=True):
            known[place] = _candidate(rule, site)
    return known


def nearest_miss(rule: Rule, graph: Graph) -> Miss | None:
    """For a local rule that matches nowhere: where most of its pattern fits, and what does not. None if it matches, or has no pattern."""
    if rule.pattern is None:
        return None
    found = list(matches(_pattern(rule.pattern), graph))
    misses = [miss for miss in found if isinstance(miss, Miss)]
    return max(misses, key=lambda miss: miss.fitted, default=None) if len(misses) == len(found) else None


def _missing(graph: Graph, site: Site) -> bool:
    """Whether an earlier rewrite took out a node that this site is made of."""
    return any(graph.node(name) is None for name in site.parts)


def _rewritten(rule: Rule, graph: Graph, site: Site) -> Graph:
    """One exact rewrite; the graph itself where an earlier one made it illegal."""
    if rule.pattern is not None:
        return _rewrite_local(rule, graph, site)
    assert rule.rewrite is not None  # a rule without a pattern has it
    return rule.rewrite(graph, site, None)


def _local_sites(rule: Rule, graph: Graph) -> tuple[list[Site], list[Refusal]]:
    assert rule.pattern is not None  # asked by the callers
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for match in matches(_pattern(rule.pattern), graph):
        if isinstance(match, Match):
            reason = _refuses(rule, match)
            if reason is None:
                sites.append(Site(match.root.name, origin_of(match.root).path))
            else:
                refusals.append(Refusal(rule.name, match.root.name, reason))
    return sites, refusals


def _refuses(rule: Rule, match: Match) -> str | None:
    inner = None if rule.shares_inner else match.escapes()
    if inner is not None:
        others = [user.name for user in inner.users if user not in match.nodes]
        return f"{inner.name} is also used by {', '.join(others)}, so it would be computed twice"
    return rule.legality(match) if rule.legality is not None else None


def _rewrite_local(rule: Rule, graph: Graph, site: Site) -> Graph:
    assert rule.pattern is not None and rule.replacement is not None  # a local rule has both  # noqa: PT018
    if _match_of(rule, graph, site) is None:
        return graph
    edited = graph.edit()
    match = _match_of(rule, edited, site)
    assert match is not None  # it is the same graph
    root = match.root
    made = rule.replacement(Builder(edited, root, origin=origin_of(root), rule=rule.name, site=site.name), match)
    for old, new in zip(match.outputs, made if isinstance(made, (tuple, list)) else (made,), strict=True):
        if type_of(old) != type_of(new):
            raise RuleError(f"{rule.name} puts {type_of(new)} where {old.name} is {type_of(old)}; this is a fault in the rule")
        edited.replace(old, new)
    if len(match.outputs) > 1:
        _sort(edited)
    return edited.clean()


def _match_of(rule: Rule, graph: Graph, site: Site) -> Match | None:
    """The rule's match at a site, if it is still there and legal."""
    root = graph.node(site.name)
    match = match_at(_pattern(rule.pattern), graph, root) if root is not None and rule.pattern is not None else None
    return match if isinstance(match, Match) and _refuses(rule, match) is None else None


def _sort(graph: Graph) -> None:
    """Put nodes before their users again, moving as few as possible: an inner value may have users before the root."""
    placed: set[Node] = set()

    def place(node: Node) -> None:
        for argument in node.all_input_nodes:
            if argument not in placed:
                node.prepend(argument)
                place(argument)
        placed.add(node)

    for node in graph.nodes:
        if node not in placed:
            place(node)
