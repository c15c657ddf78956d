"""Budgets say what is wrong with them, and plans are plain data."""

import pytest
import torch

from paretorch.budget import Budget
from paretorch.ir.errors import ArtifactError, BudgetError, PlanError
from paretorch.judge import as_scores
from paretorch.metrics import top1
from paretorch.plan import Choice, Plan


def test_no_budget_means_exact():
    assert Budget().is_exact
    assert Budget().limit is None
    assert not Budget(drift=0.0).is_exact


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": top1}, "needs max_drop"),
        ({"max_drop": 0.1}, "needs metric= or evaluate="),
        ({"metric": top1, "evaluate": top1, "max_drop": 0.1}, "give one"),
        ({"metric": top1, "drift": 0.1, "max_drop": 0.1}, "both drift and a metric"),
        ({"drift": -0.1}, "not below zero"),
        ({"drift": float("nan")}, "not below zero"),
        ({"metric": top1, "max_drop": -1}, "not below zero"),
        ({"drift": 0.1, "measure": "euclid"}, "relative, cosine, kl, top1"),
        ({"drift": 0.1, "confidence": 95}, "between 0.5 and 1"),
    ],
)
def test_a_wrong_budget_is_refused(options, sentence):
    with pytest.raises(BudgetError, match=sentence):
        Budget(**options)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("inf")]), "infinite"),
        ("good", "expected one number per sample"),
        (torch.tensor([1.0]), "1 scores for 2 samples"),
        (torch.tensor([]), "0 scores for 2 samples"),
    ],
)
def test_a_metric_must_give_one_finite_number_per_sample(scores, sentence):
    with pytest.raises(BudgetError, match=sentence):
        as_scores(scores, 2, "metric")


def test_a_plan_survives_json_to_the_byte():
    plan = Plan((Choice("tome", "attention_3", 8), Choice("bf16", "model", "bf16")), ("pack_qkv",), "onnxruntime", "abc", {"x": 1.5})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert [(c.rule, c.site, c.knob) for c in plan] == [("tome", "attention_3", 8), ("bf16", "model", "bf16")]


def test_plans_diff():
    one = Plan((Choice("tome", "a", 8),), runtime="eager")
    two = Plan((Choice("tome", "a", 12),), runtime="inductor")
    assert one.diff(two) == "runtime eager -> inductor\n- tome at a = 8\n+ tome at a = 12"
    assert one.diff(one) == ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 99, "choices": []}'])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_plan_needs_a_place_to_go(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        Plan().save(blocked / "plan.json")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "absent.json")
