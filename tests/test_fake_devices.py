"""Two fixed fake devices, one bound by bandwidth and one by arithmetic, get different plans for the same model: no machine enters."""

import pytest
import torch

import paretorch
from paretorch import Budget
from tests.zoo import make

DRIFT = 0.2


def planned(device: str) -> paretorch.Plan:
    model, inputs = make("vit_class")
    torch.manual_seed(0)
    data = [torch.randn_like(inputs[0]) for _ in range(16)]
    return paretorch.optimize(model, inputs, target=device, budget=Budget(drift=DRIFT), data=data).plan


@pytest.mark.parametrize("device", ["fake-bandwidth", "fake-compute"])
def test_plan(device: str, golden) -> None:
    golden(f"{planned(device)}\n")


def test_plans_differ() -> None:
    assert set(planned("fake-bandwidth").choices) != set(planned("fake-compute").choices)
