"""The exact part of a plan: every exact rule that is predicted to save time, applied to a fixpoint and checked against the original."""

from __future__ import annotations

from paretorch.contest import disagreement
from paretorch.ir.errors import ParetorchError
from paretorch.ir.graph import Graph
from paretorch.ledger import Entry
from paretorch.rewrites.apply import apply_rule
from paretorch.rewrites.rule import Rule
from paretorch.session import Session


def apply_exact(session: Session) -> None:
    """Set `session.exact` and `session.exact_rules`. A rule whose result differs from the original's is reported and left out."""
    expected = session.program.run_original(*session.program.example) if session.program.has_weights else None
    graph = _first_that_agrees(session, expected)
    for rule in session.exact_candidates:
        graph = _try(session, rule, graph)
    if expected is not None and disagreement(expected, graph.run(*session.program.example)) is not None:
        graph = _leave_out_culprits(session, expected)
    session.exact = graph


def _first_that_agrees(session: Session, expected: tuple[object, ...] | None) -> Graph:
    """The normalized graph, or the captured one if normalizing changed what is computed. expected: None for a model without weights."""
    problem = disagreement(expected, session.normalized.run(*session.program.example)) if expected is not None else None
    if problem is not None:
        session.notes.append(f"normalize was left out: {problem}. This is a fault of paretorch; the captured graph is used as it is.")
        session.normalized = session.program.graph
    return session.normalized


def _try(session: Session, rule: Rule, graph: Graph) -> Graph:
    """The graph after this rule, or unchanged if the rule finds nothing, saves nothing, or fails."""
    try:
        after, applied, refusals = apply_rule(rule, graph)
    except ParetorchError as error:
        session.ledger.add(Entry(rule.name, rule.family, "everywhere", "failed", str(error)))
        return graph
    session.refuse(refusals)
    if not applied:
        return graph
    saved = session.price(graph)[0] - session.price(after)[0]
    verdict, reason = ("taken", "") if saved > 0 else ("priced out", f"saves nothing on {session.target}")
    for step in applied:
        session.ledger.add(Entry(rule.name, rule.family, step.site, verdict, reason, None, saved / len(applied)))
    if saved <= 0:
        return graph
    session.exact_rules.append(rule.name)
    return after


def _leave_out_culprits(session: Session, expected: tuple[object, ...]) -> Graph:
    """Apply the rules that were taken one by one, checking after each; what changes the outputs is left out."""
    graph, taken = session.normalized, [rule for rule in session.exact_candidates if rule.name in session.exact_rules]
    session.exact_rules.clear()
    for rule in taken:
        after = apply_rule(rule, graph)[0]
        problem = disagreement(expected, after.run(*session.program.example))
        if problem is not None:
            reason = f"{problem}. This is a fault in the rule; to go on without it: optimize(..., without=[{rule.name!r}])"
            session.ledger.add(Entry(rule.name, rule.family, "everywhere", "failed", reason))
            continue
        session.exact_rules.append(rule.name)
        graph = after
    return graph
