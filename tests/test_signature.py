"""A captured model is called as the original: positional or keyword, structures kept, and a misfit is named."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from paretorch.capture import Program, capture
from paretorch.ir.errors import CaptureError, InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=2.0, *, mask=None):
        self.calls += 1
        y = self.layer(x) * scale
        return {"y": y if mask is None else y * mask, "nothing": None, "pair": (x.sum(-1), 3)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 8)


def call(program, *args, **kwargs):
    return program.call(program.graph.module(), args, kwargs)


def test_the_output_structure_is_the_models_own(net):
    found = call(capture(net, X), X)
    assert set(found) == {"y", "nothing", "pair"}
    assert found["nothing"] is None
    assert found["pair"][1] == 3
    torch.testing.assert_close(found["y"], net(X)["y"])


@pytest.mark.parametrize("give", [lambda p: call(p, X), lambda p: call(p, x=X), lambda p: call(p, X, 2.0)])
def test_positional_and_keyword_calls_bind_alike(net, give):
    torch.testing.assert_close(give(capture(net, X))["y"], net(X)["y"])


def test_keyword_example_inputs(net):
    mask = torch.ones(2, 1)
    program = capture(net, {"x": X, "mask": mask})
    torch.testing.assert_close(call(program, X, mask=mask)["y"], net(X, mask=mask)["y"])


def test_a_mutated_buffer_is_written_back(net):
    program = capture(net, X)
    before = net.calls.clone()
    call(program, X)
    assert net.calls == before + 1


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((torch.randn(3, 8),), {}, r"x is f32\[3,8\]; expected f32\[2,8\]"),
        ((X.double(),), {}, r"x is f64\[2,8\]; expected f32\[2,8\]; convert"),
        ((X.numpy(),), {}, "x is ndarray"),
        ((), {}, "the input 'x' is missing"),
        ((X,), {"y": X}, "unexpected input 'y'"),
        ((X, 2.0, 3, 4), {}, "4 positional inputs were given"),
        ((X,), {"mask": X}, "'mask' was not given when the model was captured"),
    ],
)
def test_inputs_that_do_not_fit_are_named(net, args, kwargs, sentence):
    with pytest.raises(InputError, match=sentence):
        call(capture(net, X), *args, **kwargs)


def test_training_mode_is_refused(net):
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        capture(net.train(), X)


def test_inputs_that_the_model_refuses(net):
    with pytest.raises(InputError, match="does not accept example_inputs"):
        capture(net, torch.randn(2, 9))


@pytest.mark.parametrize("model", [lambda x: x, None])
def test_only_modules_are_models(model):
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
        capture(model, X)


def test_a_dynamic_batch_takes_any_size(net):
    program = capture(net, X, {"x": {0: "batch"}})
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(call(program, x)["y"], net(x)["y"])
    assert program.is_dynamic


def test_an_exported_program_is_a_model(net):
    exported = torch.export.export(net, (X,), strict=False)
    torch.testing.assert_close(call(capture(exported, X), X)["y"], net(X)["y"])


def test_tied_weights_are_one_constant():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight = model[0].weight
    names = [name for name in capture(model, X).graph.constants if name.endswith("weight")]
    assert len(names) == 1


def test_the_signature_survives_json(net):
    program = capture(net, X)
    again = Program.from_signature(program.signature_json(), program.graph, program.example)
    torch.testing.assert_close(call(again, X)["y"], net(X)["y"])


class Impossible(nn.Module):
    def forward(self, x):
        return x * float(x.sum().item() > 0) if len(str(x.tolist())) else x


def test_what_cannot_be_captured_says_so():
    with pytest.raises(CaptureError):
        capture(Impossible().eval(), X)


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


class Dataclass(nn.Module):
    def forward(self, x):
        return Pair(x + 1, x * 2)


def test_dataclass_outputs():
    torch.export.register_dataclass(Pair, serialized_type_name="tests.Pair")
    found = call(capture(Dataclass().eval(), X), X)
    assert isinstance(found, Pair)
    torch.testing.assert_close(found.second, X * 2)
