"""Evaluations spread over an executor give the same plan as those made here."""

from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import paretorch
from paretorch import Budget
from tests.zoo import make

DEVICE = "fake-compute"  # prices are fixed there, so only the evaluations could differ


def searched(executor: Executor | None) -> paretorch.Plan:
    model, inputs = make("vit_class")
    torch.manual_seed(0)
    data = [torch.randn_like(inputs[0]) for _ in range(16)]
    return paretorch.optimize(model, inputs, target=DEVICE, budget=Budget(drift=0.2), data=data, executor=executor).plan


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_same_plan(kind: str) -> None:
    made = ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    with made as executor:
        spread = searched(executor)
    assert spread.to_json() == searched(None).to_json()
    assert spread.choices
