"""Which plans are tried on held-out data after others failed there."""

import pytest

from paretorch.attempts import ATTEMPTS, Attempts
from paretorch.cost_model.quality import Drop
from paretorch.problem import Point

LIMIT = 0.01


def point(seconds, loss, half_width=0.002):
    return Point((), seconds, "eager", loss, half_width, 100)


def found(points, true_loss):
    """The plans that are tried until one holds on held-out data, and whether one does."""
    attempts, tried = Attempts(points, LIMIT), []
    for plan in attempts:
        tried.append(plan)
        mean = true_loss(plan)
        if mean <= LIMIT:
            return tried, True
        attempts.learn(plan, Drop(mean, 0.004, 400, mean - 0.004, mean + 0.004))
    return tried, False


@pytest.mark.parametrize("flattery", [1.05, 1.5, 3.0, 10.0])
def test_plans_that_ranking_data_flatter_do_not_end_in_the_exact_one(flattery):
    crowd = [point(1 + place / 100, 0.0099 - place / 20_000) for place in range(40)]
    slower = [point(2 + place / 10, 0.0075 - place / 1_000) for place in range(7)]
    safe = point(4.0, 0.0, 0.0)
    tried, holds = found([*crowd, *slower, safe], lambda plan: flattery * plan.loss)
    assert holds
    assert tried[0] is crowd[0], "the fastest is tried first"


def test_a_surprise_leaves_out_all_that_would_be_as_much_over_the_limit():
    plans = [point(1.0, 0.009), point(1.1, 0.0085), point(1.2, 0.0035), point(1.3, 0.001)]
    tried, holds = found(plans, lambda plan: plan.loss + 0.006)
    assert (tried, holds) == ([plans[0], plans[2]], True)


def test_the_plan_whose_interval_ends_lowest_is_tried():
    crowd = [point(1 + place / 100, -0.001, 0.02) for place in range(9)]
    safe = point(2.0, 0.0005, 0.0)
    tried, holds = found([*crowd, safe], lambda plan: plan.loss if plan is safe else 0.02)
    assert holds
    assert len(tried) <= ATTEMPTS


def test_a_plan_that_fails_for_another_reason_says_nothing_of_the_others():
    plans = [point(1.0, 0.009), point(1.1, 0.0095)]
    attempts = Attempts(plans, LIMIT)
    for plan in attempts:
        attempts.learn(plan, None)
        assert attempts.margin == 0.0
