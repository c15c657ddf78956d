"""Two fixed fake devices, one bound by bandwidth and one by arithmetic, get different plans for the same model: no machine enters."""

from functools import cache

import pytest
import torch

import paretorch
from paretorch import Budget
from tests.zoo import make

DRIFT = 0.1


@cache
def optimized(device: str) -> paretorch.Optimized:
    model, inputs = make("vit_class", T=33)
    torch.manual_seed(0)
    data = [torch.randn_like(inputs[0]) for _ in range(16)]
    return paretorch.optimize(model, inputs, target=device, budget=Budget(drift=DRIFT), data=data)


def planned(device: str) -> paretorch.Plan:
    return optimized(device).plan


@pytest.mark.parametrize("device", ["fake-bandwidth", "fake-compute"])
def test_plan(device: str, golden) -> None:
    golden(f"{planned(device)}\n")


def test_plans_differ() -> None:
    assert set(planned("fake-bandwidth").choices) != set(planned("fake-compute").choices)


def test_the_report_is_of_that_plan() -> None:
    """No time is measured for a device that is not here; what is lost is, on data that ranked nothing."""
    report, plan = optimized("fake-bandwidth").report, planned("fake-bandwidth")
    taken = {(entry.rule, entry.site) for entry in report.entries if entry.verdict == "taken" and entry.knob is not None}
    assert taken == {(choice.rule, choice.site) for choice in plan}
    assert report.samples == 39  # of 16 batches of 3, a sixth of which ranked
    assert 0 < report.loss <= DRIFT
    assert f"{report.loss:.4f} (held out, n = 39" in report.sentence()
    assert len([note for note in report.notes if "is not here" in note]) == 1
