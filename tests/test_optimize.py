"""The main job on tiny models: exact and budgeted plans, the result's interface, and the answers to wrong calls."""

import json
import re

import pytest
import torch
from torch import nn

import paretorch
from paretorch import Budget, Plan
from paretorch.ir.errors import ArtifactError, BudgetError, CaptureError, InputError, PlanError, RuleError, TargetError
from paretorch.metrics import top1
from tests.zoo import make

TARGET = "cpu:eager"  # needs no compilation, so these tests are quick


@pytest.fixture(scope="module")
def vit():
    return make("vit_class")


@pytest.fixture(scope="module")
def exact(vit):
    model, inputs = vit
    return paretorch.optimize(model, inputs, target=TARGET)


@pytest.fixture(scope="module")
def budgeted(vit):
    model, inputs = vit
    data = [torch.randn_like(inputs[0]) for _ in range(24)]
    return paretorch.optimize(model, inputs, target=TARGET, budget=Budget(drift=0.5), data=data, time_limit=20)


def test_an_exact_plan_is_the_same_function(vit, exact):
    model, inputs = vit
    with torch.no_grad():
        torch.testing.assert_close(exact(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)
    assert all(choice.knob is None for choice in exact.plan)


def test_the_report_says_what_was_measured(exact):
    report = exact.report
    assert report.measured_seconds > 0
    assert report.original_seconds > 0
    assert json.loads(report.to_json())["target"] == TARGET
    for part in ("measured", "attention recognised: 2 sites", "seconds by stage"):
        assert part in str(report)
    assert {"capture", "normalize", "calibrate", "measure"} <= set(report.stages)


def test_a_report_is_a_page(exact, tmp_path):
    exact.report.to_html(tmp_path / "report.html")
    assert "measured side by side" in (tmp_path / "report.html").read_text()
    with pytest.raises(ArtifactError, match="cannot write"):
        exact.report.to_html(tmp_path / "report.html" / "below.html")


def test_a_budgeted_plan_keeps_its_budget(budgeted):
    assert budgeted.report.limit == 0.5
    if budgeted.report.loss is not None:
        assert budgeted.report.loss <= 0.5
        assert budgeted.report.samples > 0
    assert budgeted.frontier
    assert min(point.loss for point in budgeted.frontier) <= 0.5


def test_choose_needs_no_new_search(budgeted):
    points = list(budgeted.session.points)
    tighter = budgeted.choose(max_drop=0.0)
    assert budgeted.session.points == points
    assert tighter.report.loss in (None, 0.0)
    for result in (tighter, budgeted.choose(max_drop=0.5), tighter.choose(max_drop=0.0)):
        taken = {(entry.rule, entry.site) for entry in result.report.entries if entry.verdict == "taken" and entry.knob is not None}
        assert taken == {(choice.rule, choice.site) for choice in result.plan}
    with pytest.raises(BudgetError, match="outside of what was searched"):
        budgeted.choose(max_drop=0.9)


def test_every_rule_has_its_say(budgeted):
    text = budgeted.explain()
    for rule in ("tome", "skip_block", "bf16", "sliding_window"):
        assert rule in text


def test_what_there_was_no_time_for_is_said(vit):
    model, inputs = vit
    data = [torch.randn_like(inputs[0]) for _ in range(24)]
    text = paretorch.optimize(model, inputs, target=TARGET, budget=Budget(drift=0.5), data=data, time_limit=0).explain()
    for rule in ("tome", "skip_block", "bf16"):
        assert re.search(rf"{rule} at .*the time for measuring sites had passed", text)


def test_no_plan_needs_more_memory_than_the_budget_allows(vit):
    model, inputs = vit
    data = [torch.randn_like(inputs[0]) for _ in range(24)]
    result = paretorch.optimize(model, inputs, target=TARGET, budget=Budget(drift=0.5, max_memory_bytes=1000), data=data, time_limit=20)
    assert not result.plan.choices
    assert "the budget allows 0.0 MB" in result.explain()


def test_same_seed_same_evidence_same_plan(budgeted):
    assert Plan.from_json(budgeted.plan.to_json()) == budgeted.plan


def test_a_plan_applies_to_other_weights(vit, exact):
    _, inputs = vit
    other, _ = make("vit_class")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        again = exact.plan.apply(other, inputs, target=TARGET)
        torch.testing.assert_close(again(*inputs), other(*inputs), atol=1e-5, rtol=1e-4)


def test_a_plan_of_another_architecture_is_refused(exact):
    other, inputs = make("bert")
    with pytest.raises(PlanError, match="another graph"):
        exact.plan.apply(other, inputs, target=TARGET)


def test_a_device_that_is_not_here_is_predicted(vit):
    model, inputs = vit
    result = paretorch.optimize(model, inputs, target="cuda:h100")
    assert result.report.measured_seconds is None
    assert result.report.predicted_seconds > 0
    assert "not here" in result.explain()


def test_bandwidth_and_arithmetic_bound_devices_choose_differently(vit):
    """Fixed fake devices: no machine enters."""
    model, inputs = vit
    seconds = {name: paretorch.optimize(model, inputs, target=name).report.predicted_seconds for name in ("fake-bandwidth", "fake-compute")}
    assert seconds["fake-bandwidth"] != seconds["fake-compute"]


def test_without_and_rules(vit):
    model, inputs = vit
    result = paretorch.optimize(model, inputs, target=TARGET, without=["block_fusion"])
    assert result.plan.exact == ()
    assert not result.report.entries


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"target": "cuda:a10"}, TargetError, "no device named 'cuda:a10'"),
        ({"target": "cpu:tensorrt"}, TargetError, "tensorrt"),
        ({"rules": ["tomee"]}, RuleError, "Close: tome"),
        ({"without": ["everything"]}, RuleError, "no rule or family named 'everything'"),
        ({"budget": Budget(drift=0.1)}, BudgetError, "needs data="),
        ({"budget": Budget(drift=0.1), "data": []}, BudgetError, "data is empty"),
        ({"budget": Budget(drift=0.1), "data": [torch.randn(2, 5)] * 9}, InputError, "expected"),
        ({"budget": Budget(metric=top1, max_drop=0.1), "data": [torch.randn(2, 5)] * 9}, InputError, "pairs"),
    ],
)
def test_wrong_calls(vit, options, error, sentence):
    model, inputs = vit
    with pytest.raises(error, match=sentence):
        paretorch.optimize(model, inputs, **{"target": TARGET, **options})


def test_a_metric_that_returns_nan(vit):
    model, inputs = vit
    data = [(inputs[0], torch.zeros(len(inputs[0]), dtype=torch.int64))] * 9
    budget = Budget(metric=lambda outputs, labels: torch.full((len(labels),), float("nan")), max_drop=0.1)
    with pytest.raises(BudgetError, match="NaN"):
        paretorch.optimize(model, inputs, target=TARGET, budget=budget, data=data, rules=["skip_block"])


def test_a_plan_whose_scores_are_nan_fails_alone(vit):
    """A metric that is finite on the original's outputs and NaN on those of any plan: plans fail, the search does not."""
    model, inputs = vit
    expected = model(*inputs).detach()

    def metric(outputs, labels):
        return torch.where((outputs - expected[: len(outputs)]).abs().amax(1) < 1e-4, 1.0, float("nan"))

    data = [(inputs[0], torch.zeros(len(inputs[0]), dtype=torch.int64))] * 9
    found = paretorch.optimize(model, inputs, target=TARGET, budget=Budget(metric=metric, max_drop=0.1), data=data, rules=["skip_block"])
    assert len(found.plan) == 0
    assert any("on the outputs of this plan, metric returned NaN" in entry.reason for entry in found.report.entries)


def test_training_mode_and_misfits(vit):
    model, _ = vit
    with pytest.raises(InputError, match="training mode"):
        paretorch.optimize(nn.Linear(4, 4).train(), torch.randn(1, 4))
    with pytest.raises(InputError, match="does not accept"):
        paretorch.optimize(model, torch.randn(1))


class Refuses(nn.Module):
    def forward(self, x):
        return x + len(str(x.tolist()))


def test_a_model_that_cannot_be_captured():
    with pytest.raises(CaptureError, match="cannot be captured"):
        paretorch.optimize(Refuses().eval(), torch.randn(2, 4))


class HalfExportable(nn.Module):
    """Its middle looks at values; what is before and after can be captured."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
        self.after = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x):
        x = self.before(x)
        return self.after(x * len(str(round(float(x.sum()), 1))))


def test_what_can_be_captured_of_a_model_is_optimized():
    torch.manual_seed(0)
    model, x = HalfExportable().eval(), torch.randn(4, 8)
    result = paretorch.optimize(model, x, target=TARGET)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result(x[:2]), model(x[:2]), atol=1e-4, rtol=1e-4)
    notes = result.explain()
    assert "the whole model could not be captured" in notes
    assert "before:" in notes
    assert "after:" in notes


class Loop(nn.Module):
    """Scores come from a loop of the user's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.layer(x)


def test_an_evaluate_budget_runs_the_users_loop():
    torch.manual_seed(0)
    model, calls = Loop().eval(), []

    def evaluate(run, items):
        calls.append(len(items))
        return [-float((run(item) - item).abs().mean()) for item in items]

    items = [torch.randn(2, 8) for _ in range(12)]
    result = paretorch.optimize(model, items[0], target=TARGET, budget=Budget(evaluate=evaluate, max_drop=0.05), data=items, time_limit=10)
    assert calls
    assert result(items[0]).shape == (2, 8)


def test_a_model_that_draws_numbers_is_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(InputError, match="draws random numbers"):
        paretorch.optimize(Noisy().eval(), torch.randn(2, 8), target=TARGET)


def test_a_size_that_depends_on_data_can_be_priced():
    class Chosen(nn.Module):
        def forward(self, x):
            return (x[x.sum(-1) > 0] * 2).sum(0)

    x = torch.randn(5, 8)
    torch.testing.assert_close(paretorch.optimize(Chosen().eval(), x, target=TARGET)(x), Chosen()(x))
