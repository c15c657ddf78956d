"""What a search measured is kept by weights, data and measure; another of these is measured anew."""

import pytest
import torch

import paretorch
from paretorch import Budget
from paretorch.judge import Judge
from paretorch.metrics import top1
from tests.zoo import make

DEVICE = "fake-compute"


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """The batches of the ranking part that were scored since the last clear; held-out ones decide anew each time."""
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path))
    calls, plain = [], Judge._record

    def record(self, execute, item):
        if any(item is ranking for ranking in self.split.ranking):
            calls.append(item)
        return plain(self, execute, item)

    monkeypatch.setattr(Judge, "_record", record)
    return calls


def data(seed=0, labelled=False):
    generator = torch.Generator().manual_seed(seed)
    _, inputs = make("vit_class")
    batches = [torch.randn(inputs[0].shape, generator=generator) for _ in range(16)]
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches] if labelled else batches


def searched(budget=None, given=None, scale=1.0):
    model, inputs = make("vit_class")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    rules = ["layer_skipping", "tome"]  # others cost time here, and tell nothing more
    return paretorch.optimize(model, inputs, target=DEVICE, budget=budget or Budget(drift=0.2), data=given or data(), rules=rules)


def test_nothing_is_measured_twice(looked, tmp_path):
    first = searched()
    assert looked
    assert len(list(tmp_path.glob("evidence-*.json"))) == 1
    looked.clear()
    again = searched()
    assert not looked
    assert again.plan.to_json() == first.plan.to_json()


@pytest.mark.parametrize("change", ["weights", "data", "measure"])
def test_what_changed_is_measured_anew(looked, change):
    searched()
    looked.clear()
    searched(
        Budget(drift=0.2, measure="cosine" if change == "measure" else "relative"),
        data(1 if change == "data" else 0),
        1.01 if change == "weights" else 1.0,
    )
    assert looked


def test_a_metric_that_remembers_is_not_kept(looked, tmp_path):
    state = {"calls": 0}

    def metric(outputs, labels):
        state["calls"] += 1
        return top1(outputs, labels)

    searched(Budget(metric=metric, max_drop=0.5), data(labelled=True))
    assert not list(tmp_path.glob("evidence-*.json"))
    searched(Budget(metric=top1, max_drop=0.5), data(labelled=True))
    assert list(tmp_path.glob("evidence-*.json"))


def test_a_damaged_file_is_measured_again(looked, tmp_path):
    searched()
    (path,) = tmp_path.glob("evidence-*.json")
    path.write_text("{")
    looked.clear()
    searched()
    assert looked
