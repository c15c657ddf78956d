"""torch.compile(backend="paretorch"): the same results as eager, one graph, and a stated reason where a graph is passed on unchanged."""

import pytest
import torch
from torch import nn

import paretorch
from paretorch import backend
from tests.zoo import make


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    backend.LAST_NOTES.clear()


@pytest.mark.parametrize("name", ["vit_class", "llama"])
def test_parity(name):
    model, inputs = make(name)
    compiled = torch.compile(model, backend="paretorch")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)
    assert backend.LAST_NOTES == []


def test_a_changed_weight_is_seen():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    compiled = torch.compile(model, backend="paretorch")
    x = torch.randn(2, 8)
    with torch.no_grad():
        compiled(x)
        model[1].weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))


def test_gradients_go_to_inductor():
    model = nn.Linear(8, 8)
    compiled = torch.compile(model, backend="paretorch")
    compiled(torch.randn(2, 8)).sum().backward()
    assert model.weight.grad is not None
    assert "needs gradients" in backend.LAST_NOTES[0]


def test_it_is_registered():
    assert "paretorch" in torch._dynamo.list_backends()
    assert paretorch.backend.paretorch is backend.paretorch
