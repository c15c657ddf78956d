"""Plans of several rules at once: what each rule keeps alone, they keep together, in the order in which a search applies them."""

from __future__ import annotations

import random

import pytest

from paretorch.ir.analyze import analyze
from paretorch.ir.errors import CaptureError, InputError, PlanError
from paretorch.ir.graph import Graph
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import Candidate, apply_choice, propose
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Knob
from paretorch.session import ORDER
from tests.architectures import NAMES, make
from tests.legality import BATCH, Subject, captured

SEED, PLANS, MOST = 6, 4, 5
TENTH = sorted(random.Random(SEED).sample(NAMES, len(NAMES) // 10), key=NAMES.index)
FAMILY = {rule.name: (ORDER.index(rule.family), place) for place, rule in enumerate(RULES) if not rule.is_exact}
LATE = ("own: late class token", (("skip_feed_forward", "add_3", 1), ("tome", "attention", 4), ("pitome", "attention_1", 0.16)))


@pytest.mark.parametrize("name", [name if name in TENTH else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_random_plans_keep_what_each_rule_keeps(name: str) -> None:
    subject = subject_of(name)
    candidates = propose(subject.graph, analyze(subject.graph), [rule for rule in RULES if not rule.is_exact])[0]
    candidates = [candidate for candidate in candidates if candidate.knobs]
    if not candidates:
        pytest.skip("no lossy rule has a place here")
    draws = random.Random(f"{SEED} {name}")
    for _ in range(PLANS):
        chosen = draws.sample(candidates, min(draws.randint(2, MOST), len(candidates)))
        after, plan = applied(subject.graph, [(candidate, draws.choice(candidate.knobs)) for candidate in chosen])
        assert not subject.breaks(after), plan


def test_a_value_that_is_brought_back_at_once_follows_both_maps() -> None:
    """Without the block's second half nothing stands between the later merge and what brings back the tokens of the earlier one."""
    name, plan = LATE
    subject = subject_of(name)
    after, rules = subject.graph, {rule.name: rule for rule in RULES}
    for rule, site, knob in plan:
        after = apply_choice(rules[rule], after, site, knob)
    assert not subject.breaks(after)


def subject_of(name: str) -> Subject:
    try:
        model, inputs = make(name, BATCH)
        program = captured(model, inputs, False)
    except (CaptureError, InputError) as error:
        pytest.skip(str(error))
    return Subject(name, program, normalize(program.graph))


def applied(graph: Graph, chosen: list[tuple[Candidate, Knob]]) -> tuple[Graph, list[str]]:
    """The graph with those of the choices that go together, and what they are."""
    places = {node.name: place for place, node in enumerate(graph.nodes)}

    def turn(choice: tuple[Candidate, Knob]) -> tuple[int, int, int]:
        candidate, _ = choice
        return (*FAMILY[candidate.rule.name], places.get(candidate.site.parts[0], len(places)))

    plan = []
    for candidate, knob in sorted(chosen, key=turn):
        try:
            graph = apply_choice(candidate.rule, graph, candidate.site.name, knob)
        except PlanError:
            continue  # an earlier one took it out
        plan.append(f"{candidate.rule.name} at {candidate.site.name} = {knob}")
    return graph, plan
