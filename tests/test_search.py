"""The search on a made-up problem whose best plan is known: seconds and losses are sums over choices."""

from dataclasses import dataclass

import pytest

from paretorch.ir.errors import PlanError
from paretorch.moves import measure_moves
from paretorch.problem import ConflictError, Problem
from paretorch.rewrites.rule import MODEL
from paretorch.search import frontier, search
from paretorch.stages import Stages


@dataclass(frozen=True)
class FakeRule:
    name: str


@dataclass(frozen=True)
class FakeSite:
    name: str


@dataclass(frozen=True)
class FakeCandidate:
    rule: FakeRule
    site: FakeSite
    knobs: tuple


def candidate(rule, site, *knobs):
    return FakeCandidate(FakeRule(rule), FakeSite(site), knobs)


SECONDS = {"merge": 0.01, "skip": 0.10, "slow": -0.05}
LOSS = {"merge": 0.001, "skip": 0.02, "slow": 0.0}


def problem(candidates, limit=0.02, evaluations=40, apply=None, log=None):
    def seconds(graph):
        return max(0.05, 1.0 - sum(SECONDS[c.rule] * c.knob for c in graph)), "eager"

    def loss(choices, graph):
        return sum(LOSS[c.rule] * c.knob for c in graph), 0.001, 100

    records = [] if log is None else log
    return Problem(
        candidates=candidates,
        apply=apply or (lambda choices: tuple(sorted(choices, key=str))),
        price=seconds,
        drifts=lambda choices, samples: [loss((), (choice,))[0] for choice in choices],
        loss=loss,
        limit=limit,
        max_evaluations=evaluations,
        stages=Stages(),
        record=lambda *entry: records.append(entry),
    )


CANDIDATES = [candidate("merge", f"layer{i}", 1, 2, 4) for i in range(4)] + [candidate("skip", f"layer{i}", 1) for i in range(4)]


def best_within(points, limit):
    return min((p for p in points if p.loss <= limit), key=lambda p: p.predicted)


def test_it_finds_the_cheap_moves_first():
    points = search(problem(CANDIDATES))
    best = best_within(points, 0.02)
    assert best.loss <= 0.02
    # merging saves 10 per unit of loss and skipping 5: all of the loss that is allowed goes into merging
    assert best.predicted == pytest.approx(1 - 16 * 0.01, abs=0.05)
    assert {c.rule for c in best.choices} == {"merge"}


def test_a_wider_budget_is_never_slower():
    points = search(problem(CANDIDATES, limit=0.08))
    speeds = [best_within(points, limit).predicted for limit in (0.0, 0.02, 0.04, 0.08)]
    assert speeds == sorted(speeds, reverse=True)
    assert any(c.rule == "skip" for c in best_within(points, 0.08).choices)


def test_same_seed_same_points():
    assert search(problem(CANDIDATES)) == search(problem(CANDIDATES))


def test_what_saves_nothing_is_priced_out_and_never_measured():
    log = []
    points = search(problem([candidate("slow", "layer0", 1)], log=log))
    assert [point.choices for point in points] == [()]
    assert log[0][0] == "priced out"


def test_conflicts_are_recorded_and_left_out():
    def apply(choices):
        odd = next((c for c in choices if c.rule != choices[0].rule), None)
        if odd is not None:
            raise ConflictError("skip took the site of merge away", odd)
        return tuple(choices)

    log = []
    points = search(problem(CANDIDATES, limit=0.3, apply=apply, log=log))
    assert all(len({c.rule for c in point.choices}) <= 1 for point in points)
    assert best_within(points, 0.3).predicted <= 1 - 16 * 0.01 + 1e-9, "a conflict costs the choice, not the plan"
    assert any(entry[0] == "in conflict" and "took the site" in entry[2] for entry in log)


def test_a_plan_that_fails_says_so_itself():
    log = []
    asked = problem(CANDIDATES, limit=0.3, log=log)
    asked.loss = refused_from(2, asked.loss)
    assert all(len(point.choices) < 2 for point in search(asked))
    failed = [choice for verdict, choice, reason, *_ in log if verdict == "failed" and reason == "too large"]
    assert failed
    assert all(choice.rule == "plan" and "; " in choice.site for choice in failed)


def refused_from(length, loss):
    def refuse(choices, graph):
        if len(choices) >= length:
            raise PlanError("too large")
        return loss(choices, graph)

    return refuse


def test_a_rule_on_the_whole_model_is_not_tried_at_places_as_well():
    applied = []

    def apply(choices):
        applied.append({choice.site for choice in choices if choice.rule == "skip"})
        return tuple(sorted(choices, key=str))

    search(problem([candidate("skip", MODEL, 1), *CANDIDATES], limit=0.3, apply=apply))
    assert {MODEL} in applied
    assert all(sites == {MODEL} for sites in applied if MODEL in sites)


def test_the_evaluation_limit_holds():
    assert len(search(problem(CANDIDATES, evaluations=3))) <= 4


def test_the_frontier_has_no_beaten_point():
    points = frontier(search(problem(CANDIDATES, limit=0.08)))
    for a in points:
        assert not any(b.predicted <= a.predicted and b.loss < a.loss for b in points)
    assert points == sorted(points, key=lambda p: p.predicted)


def test_an_interruption_keeps_what_was_found():
    made = problem(CANDIDATES)
    plain, count = made.loss, iter(range(100))

    def loss(choices, graph):
        if next(count) == 4:
            raise KeyboardInterrupt
        return plain(choices, graph)

    made.loss = loss
    points = search(made)
    assert made.was_interrupted
    assert len(points) == 5


def test_choices_that_share_a_slot_take_turns():
    records = []
    asked = problem(CANDIDATES, limit=0.03, log=records)
    asked.slot = lambda choice: choice.site
    points = search(asked)
    assert all(len({choice.site for choice in point.choices}) == len(point.choices) for point in points)
    assert {choice.rule for point in points for choice in point.choices} == {"merge", "skip"}
    assert best_within(points, 0.03).predicted < 1.0


def with_losses(candidates, alone, together, limit, **more):
    """A problem in which choices drift `alone` and lose `together`, both functions of knobs."""
    asked = problem(candidates, limit=limit, **more)
    asked.drifts = lambda choices, samples: [alone(choice) for choice in choices]
    asked.loss = lambda choices, graph: (together([choice.knob for choice in graph]), 0.001, 100)
    return asked


def test_a_value_for_all_places_is_tried_where_what_they_do_alone_misleads():
    merges = [candidate("merge", f"layer{i}", 1, 2, 4) for i in range(4)]
    asked = with_losses(merges, lambda choice: 0.001, lambda knobs: 0.01 * sum(knob**2 for knob in knobs), limit=0.045)
    best = best_within(search(asked), 0.045)
    assert [choice.knob for choice in best.choices] == [1, 1, 1, 1]


def test_a_lead_of_the_first_places_is_tried_where_what_they_do_alone_misleads():
    merges = [candidate("merge", f"layer{i}", 1, 2, 4) for i in range(4)]

    def together(choices, graph):
        return sum(0.01 * choice.knob**2 * (1, 1, 8, 8)[int(choice.site[-1])] for choice in graph), 0.001, 100

    asked = with_losses(merges, lambda choice: 0.001, sum, limit=0.09)
    asked.loss = together
    best = best_within(search(asked), 0.09)
    assert [(choice.site, choice.knob) for choice in best.choices] == [("layer0", 2), ("layer1", 2)]


def test_how_drift_grows_is_measured_at_one_place_of_a_rule_and_holds_for_the_others():
    merges = [candidate("merge", f"layer{i}", 1, 2, 4) for i in range(4)] + [candidate("skip", "layer0", 1)]
    asked = []

    def alone(choice):
        asked.append((choice.site, choice.knob) if choice.rule == "merge" else ("skip", 1))
        return 0.0 if choice.rule == "skip" or choice.knob == 1 else (1 + int(choice.site[-1])) * {2: 0.01, 4: 1.0}[choice.knob]

    moves = measure_moves(with_losses(merges, alone, sum, limit=1.0), 1.0)
    assert sorted(asked) == sorted([("layer0", 1), ("layer0", 2), ("layer0", 4), *((f"layer{i}", 2) for i in (1, 2, 3)), ("skip", 1)])
    drifts = {(move.choice.site, move.choice.knob): move.drift for move in moves if move.choice.rule == "merge"}
    assert drifts["layer0", 4] == 1.0
    assert drifts["layer3", 2] == 0.04
    assert drifts["layer3", 4] == pytest.approx(4.0)
    assert 0 < drifts["layer3", 1] < 0.01


def test_a_value_that_fails_costs_that_value_alone():
    def alone(choice):
        return "too few rows" if choice.knob == 4 else 0.01

    log = []
    moves = measure_moves(with_losses([candidate("merge", "layer0", 1, 2, 4)], alone, sum, limit=1.0, log=log), 1.0)
    assert [move.choice.knob for move in moves] == [1, 2]
    assert [entry[2] for entry in log if entry[0] == "failed"] == ["too few rows"]
