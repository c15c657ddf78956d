"""How a session predicts what candidates save: of equal ones on a graph with few of the equal layers, as if all weights were there."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from paretorch.cost_model.memory import weight_bytes
from paretorch.ir.analyze import analyze
from paretorch.ir.graph import Graph
from paretorch.plan import Choice
from paretorch.rewrites.apply import Candidate, apply_choice
from paretorch.rewrites.rule import MODEL
from paretorch.savings import Pricing
from paretorch.shortened import shortened

if TYPE_CHECKING:
    from paretorch.session import Session


def pricing_of(session: Session) -> Pricing:
    """For candidates on the session's exact graph."""
    facts, weights = analyze(session.exact), weight_bytes(session.exact)
    short, places = shortened(session.exact, facts), facts.repetition.places
    names = {node.name for node in short.nodes}
    by_name = {rule.name: rule for rule in session.rules}

    def seconds(graph: Graph) -> float:
        return session.price(graph, weights)[0]

    whole, part = session.price(session.exact)[0], seconds(short)

    def saved_in_short(choice: Choice) -> float:
        return part - seconds(apply_choice(by_name[choice.rule], short, choice.site, choice.knob))

    def saved(choice: Choice) -> float:
        if choice.site == MODEL:  # what is done to every layer saves in proportion
            return saved_in_short(choice) * whole / part
        return whole - session.price(session.apply((choice,)))[0]

    def alike(candidate: Candidate) -> Hashable:
        """The places of its site within repeated layers; its own name where a part of the site is in none."""
        parts = [places.get(name) for name in candidate.site.parts]
        return tuple(parts) if None not in parts else candidate.site.name

    return Pricing(
        alike=alike,
        saved=saved,
        saved_in_short=saved_in_short,
        is_in_short=lambda candidate: names.issuperset(candidate.site.parts),
    )
