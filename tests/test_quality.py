"""Drift against hand arithmetic; drops, intervals and acceptance; splits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.cost_model.quality import MEASURES, Drop, accepts, drift, paired_drop, samples_needed, split
from paretorch.ir.errors import BudgetError


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_outputs_have_no_drift(measure):
    outputs = (torch.randn(3, 4, 5), torch.randn(3, 2), None, 7)
    assert torch.equal(drift(measure, outputs, outputs), torch.zeros(3, dtype=torch.float64))


def test_relative_by_hand():
    expected, found = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    assert drift("relative", (expected,), (found,)).tolist() == [0.2, 2.0]  # 1 / 5; where the original is zero, the distance itself


def test_relative_joins_all_outputs_and_shared_ones():
    expected = (torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [1.0]]), torch.tensor(0.0))
    found = (torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [1.0]]), torch.tensor(1.0))
    assert drift("relative", expected, found).tolist() == [0.2, 1.0]


def test_cosine_by_hand():
    expected, found = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert drift("cosine", (expected,), (found,)).tolist() == [1.0, 0.0]


def test_kl_by_hand():
    expected, found = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.75, 0.25]]))
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert drift("kl", (expected,), (found,)).item() == pytest.approx(by_hand, rel=1e-6)


def test_kl_with_hidden_classes():
    expected = torch.tensor([[0.0, 1.0, -math.inf]])
    assert drift("kl", (expected,), (expected.clone(),)).item() == 0.0
    assert drift("kl", (expected,), (torch.tensor([[0.0, -math.inf, 1.0]]),)).item() == math.inf


def test_top1_is_a_share_of_rows():
    expected = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    found = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert drift("top1", (expected,), (found,)).tolist() == [0.5, 0.0]


def test_what_is_not_finite_is_infinitely_far_unless_it_was_so():
    expected = torch.tensor([[1.0, -math.inf], [1.0, 2.0], [math.nan, 1.0]])
    assert drift("relative", (expected,), (expected.clone(),)).tolist() == [0.0, 0.0, 0.0]
    found = torch.tensor([[1.0, -math.inf], [1.0, math.nan], [1.0, 1.0]])
    assert drift("relative", (expected,), (found,)).tolist() == [0.0, math.inf, math.inf]


def test_half_precision_and_integers_are_compared_as_numbers():
    expected = torch.tensor([[3, 4]])
    assert drift("relative", (expected,), (torch.tensor([[3, 5]]),)).item() == pytest.approx(0.2)
    half = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert drift("relative", (half,), (half,)).item() == 0.0


def test_wrong_questions_are_refused():
    one = torch.ones(2, 2)
    with pytest.raises(BudgetError, match="no drift measure named 'mse'; expected one of relative, cosine, kl, top1"):
        drift("mse", (one,), (one,))
    with pytest.raises(BudgetError, match="returns no tensor"):
        drift("relative", (3,), (3,))
    with pytest.raises(BudgetError, match=r"an output has shape \[2, 3\], the original's has \[2, 2\]"):
        drift("relative", (one,), (torch.ones(2, 3),))


def test_drop_of_right_or_wrong_scores():
    before = torch.ones(1000)
    after = before.clone()
    after[:20] = 0
    drop = paired_drop(before, after)
    assert (drop.mean, drop.n) == (pytest.approx(0.02), 1000)
    assert drop.half_width == pytest.approx(1.96 * math.sqrt(0.02 / 1000), rel=0.1)
    assert drop.low < drop.mean < drop.high


def test_no_change_on_few_samples_proves_little():
    assert paired_drop(torch.ones(20), torch.ones(20)).half_width > 0.1
    assert paired_drop(torch.ones(4000), torch.ones(4000)).half_width < 0.001


def test_drop_of_other_scores_is_by_bootstrap_and_seeded():
    before = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = before - 0.1 - 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    drop = paired_drop(before, after, seed=4)
    assert drop == paired_drop(before - after, seed=4)
    assert drop.mean == pytest.approx(0.1, abs=0.02)
    assert drop.half_width == pytest.approx(1.96 * 0.05 / math.sqrt(200), rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_intervals_hold_what_they_promise_on_average(seed):
    draws = torch.Generator().manual_seed(seed)
    worse = (torch.rand(400, generator=draws) < 0.05).double()
    drop = paired_drop(worse)
    assert abs(drop.mean - 0.05) < 5 * drop.half_width  # five half widths: never, at 400 samples


def test_drops_that_cannot_be_computed():
    with pytest.raises(BudgetError, match="no score"):
        paired_drop(torch.ones(0))
    with pytest.raises(BudgetError, match="3 scores before and 2 after do not pair"):
        paired_drop(torch.ones(3), torch.ones(2))
    assert paired_drop(torch.ones(1)).half_width == math.inf


def test_acceptance_as_the_design_says():
    assert accepts(Drop(0.004, 0.003, 5000, 0.001, 0.007), 0.005) is None
    assert accepts(Drop(0.006, 0.003, 5000, 0.003, 0.009), 0.005) == (
        "the mean drop is 0.006 ± 0.003 (95 % interval, n = 5,000); the budget is 0.005"
    )
    assert "about 16,000 samples would do" in accepts(Drop(0.004, 0.02, 1000, -0.016, 0.024), 0.005)
    assert accepts(Drop(0.0, 0.0024, 1000, -0.0024, 0.0024), 0.0) is None  # a quarter of a point is the finest that is demanded
    assert accepts(Drop(math.nan, 0.001, 1000, 0.0, 0.0), 0.005) is not None


def test_acceptance_with_confidence():
    drop = Drop(0.004, 0.002, 2000, 0.002, 0.006)
    assert accepts(drop, 0.005) is None
    assert accepts(drop, 0.007, 0.95) is None
    sentence = accepts(drop, 0.005, 0.95)
    assert "at 95% confidence it may be 0.006" in sentence
    assert "about 8,000 samples would do" in sentence
    assert accepts(drop, 0.005, 0.6) is None


def test_samples_needed():
    assert samples_needed(Drop(0.0, 0.02, 100, -0.02, 0.02), 0.01) == 400
    assert samples_needed(Drop(0.0, math.inf, 1, 0, 0), 0.01) == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.integers(0, 100), st.floats(0.01, 0.99))
def test_split_is_a_partition_and_the_same_each_time(n, seed, share):
    ranking, held_out = split(n, seed, share)
    assert sorted((*ranking, *held_out)) == list(range(n))
    assert ranking
    assert held_out
    assert (ranking, held_out) == split(n, seed, share)


def test_split_depends_on_the_seed_and_refuses_nonsense():
    assert split(100, 0, 0.2) != split(100, 1, 0.2)
    assert len(split(6000, 0, 1 / 6)[0]) == 1000
    with pytest.raises(BudgetError, match=r"ranking_share=1\.5 is no share"):
        split(10, 0, 1.5)
    with pytest.raises(BudgetError, match="1 samples cannot be split"):
        split(1, 0, 0.5)
