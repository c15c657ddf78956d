"""Capture gives one graph that computes what the model computes, however the model is written."""

import pytest
import torch
from torch import nn

from paretorch.capture import Call, capture
from paretorch.contest import relative_error
from paretorch.ir.errors import CaptureError, InputError
from tests import tiny_transformers
from tests.zoo import NAMES, make

QUICK = ("bert", "llama_cache", "convnext")


def outputs_agree(program, limit=0.0):
    expected, found = program.run_original(*program.example), program.graph.run(*program.example)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert relative_error(a.double(), b.double()) <= limit


def call(program, *args, **kwargs):
    return program.call(program.graph.module(), args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_the_zoo(name):
    outputs_agree(capture(*make(name)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=() if name in QUICK and attention == "sdpa" else pytest.mark.slow)
        for name in tiny_transformers.NAMES
        for attention in ("sdpa", "eager")
    ],
)
def test_transformers(name, attention):
    model, inputs = tiny_transformers.make(name, attention)
    program = capture(model, inputs)
    outputs_agree(program)
    with torch.no_grad():
        expected = model(**inputs)
    found = call(program, **inputs)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    torch.testing.assert_close(found[0], expected[0])


def test_a_cache_is_an_output_and_an_input():
    model, inputs = tiny_transformers.make("llama_cache")
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache, "use_cache": True}
        program = capture(model, step)
        assert cache.get_seq_length() == 7, "capture leaves the user's cache as it was"
        found = call(program, **step)
        expected = model(**step)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.past_key_values.get_seq_length() == 8
    torch.testing.assert_close(found.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)


class Counter(nn.Module):
    """Adds how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


def test_a_changed_buffer_is_an_input_and_an_output():
    model, x = Counter().eval(), torch.randn(2, 3)
    program = capture(model, x)
    assert model.calls[0] == 0, "capture leaves the model as it was"
    assert [len(program.graph.inputs), len(program.graph.outputs), len(program.example)] == [2, 2, 2]
    for number in (1, 2, 3):
        torch.testing.assert_close(call(program, x), x + number)
    assert model.calls[0] == 3
    outputs_agree(program)
    assert model.calls[0] == 3, "a comparison leaves the model as it was"


class WritesInput(nn.Module):
    def forward(self, x, cache):
        cache[:, 0] = x
        return cache.sum(-1) * 2


def test_a_changed_input_is_written_back():
    model, x = WritesInput().eval(), torch.randn(2)
    program = capture(model, (x, torch.zeros(2, 3)))
    ours, theirs = torch.ones(2, 3), torch.ones(2, 3)
    torch.testing.assert_close(call(program, x, ours), model(x, theirs))
    assert torch.equal(ours, theirs)
    outputs_agree(program)


class Casts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.layer(y)
        return z.float() + y


def test_regions_with_modes_of_their_own():
    outputs_agree(capture(Casts().eval(), torch.randn(2, 4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model, inputs = make("vit_class")
    outputs_agree(capture(model.to(dtype), tuple(x.to(dtype) for x in inputs)))


def test_keywords_in_another_order():
    class Order(nn.Module):
        def forward(self, a, b, *, c=None, d=None):
            return a - 2 * b + 3 * c - 4 * d

    inputs = {name: torch.randn(2) for name in "dbca"}
    program = capture(Order().eval(), inputs)
    torch.testing.assert_close(call(program, **dict(reversed(inputs.items()))), Order()(**inputs))
    torch.testing.assert_close(call(program, inputs["a"], inputs["b"], d=inputs["d"], c=inputs["c"]), Order()(**inputs))


def test_any_number_of_positional_inputs():
    class Sum(nn.Module):
        def forward(self, *terms):
            return sum(terms)

    given = tuple(torch.randn(2) for _ in range(3))
    torch.testing.assert_close(call(capture(Sum().eval(), given), *given), sum(given))


class Two(nn.Module):
    def forward(self, a, b):
        return torch.cat([a, b], -1)


AB = (torch.randn(2, 4), torch.randn(2, 6))


def test_one_tensor_given_twice_is_two_inputs():
    class Difference(nn.Module):
        def forward(self, x, y, *, pair):
            return x - 2 * y + 3 * pair[0] + 5 * pair[1]

    x, model = torch.ones(2, 3), Difference().eval()
    program = capture(model, Call((x, x), {"pair": (x, x)}))
    given = [torch.full((2, 3), float(10**place)) for place in range(4)]
    assert torch.equal(call(program, *given[:2], pair=tuple(given[2:])), model(*given[:2], pair=tuple(given[2:])))


class Loose(nn.Module):
    def forward(self, x, **options):
        return x + options["y"] * options["times"]


@pytest.mark.parametrize("dims", [{"x": {0: "b"}, "y": {0: "b"}}, {"x": {0: "b"}, "options": {"y": {0: "b"}}}])
def test_keywords_that_forward_does_not_name_have_shapes(dims):
    model = Loose().eval()
    program = capture(model, {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "times": 2.0}, dims)
    assert torch.equal(call(program, x=torch.ones(5, 3), y=torch.ones(5, 3), times=2.0), torch.full((5, 3), 3.0))
    assert "forward" not in vars(model)


def test_equal_names_are_one_size():
    program = capture(Two().eval(), AB, {"a": {0: "batch"}, "b": {0: "batch"}})
    assert len(program.symbols) == 1
    assert call(program, torch.randn(5, 4), torch.randn(5, 6)).shape == (5, 10)
    with pytest.raises(InputError, match="axis 0 of b is 4, which does not go with axis 0 of a"):
        call(program, torch.randn(5, 4), torch.randn(4, 6))


def test_ranges_of_sizes():
    batch = torch.export.Dim("batch", min=2, max=8)
    program = capture(Two().eval(), AB, ({0: batch}, {0: batch}))
    with pytest.raises(InputError, match="axis 0 of a is 9; dynamic_shapes allows 2 to 8"):
        call(program, torch.randn(9, 4), torch.randn(9, 6))


def test_sizes_that_depend_on_each_other():
    half = torch.export.Dim("half", min=2, max=64)
    program = capture(nn.PixelUnshuffle(2).eval(), torch.randn(1, 3, 8, 4), {"input": {2: 2 * half}})
    assert call(program, torch.randn(1, 3, 12, 4)).shape == (1, 12, 6, 2)
    with pytest.raises(InputError, match=r"axis 2 of input is 7; expected a size of the form 2\*"):
        call(program, torch.randn(1, 3, 7, 4))


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [({"c": {0: "batch"}}, "dynamic_shapes names c; example_inputs gives a, b"), ({"a": {0: "batch"}}, "dynamic_shapes cannot be kept")],
)
def test_dynamic_shapes_that_do_not_fit(dims, sentence):
    with pytest.raises(InputError, match=sentence):
        capture(Two().eval(), AB, dims)


def test_an_exported_program_by_position_and_by_name():
    exported = torch.export.export(Two(), AB, strict=False)
    torch.testing.assert_close(call(capture(exported, AB), *AB), Two()(*AB))
    program = capture(exported, {"b": AB[1], "a": AB[0]})
    torch.testing.assert_close(call(program, *AB), Two()(*AB))
    with pytest.raises(InputError, match="do not fit the exported program"):
        capture(exported, AB[0])


class OnlyDynamo(nn.Module):
    """torch.export refuses to see a plain attribute change; Dynamo keeps it outside of the graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x, y, scale=2.0):
        return {"out": self.layer(x) @ self.other(y), "scale": scale, "same": y}


def test_dynamos_graph_has_the_models_names_and_order(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not today")

    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda m, *rest, **given: (refuse if m is model else export)(m, *rest, **given))
    model, inputs = OnlyDynamo().eval(), (torch.randn(4, 4), torch.randn(4, 4))
    program = capture(model, inputs)
    assert set(program.graph.constants) == {"layer.weight", "other.weight"}
    assert len(program.graph.outputs) == 2, "of the inputs only those that the model returns are outputs"
    assert "captured by Dynamo, since torch.export: RuntimeError: not today" in program.notes[0]
    outputs_agree(program)
    found, expected = call(program, *inputs), model(*inputs)
    torch.testing.assert_close(found["out"], expected["out"])
    assert found["scale"] == 2.0


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return x


def test_an_error_names_the_line_of_the_model():
    with pytest.raises(CaptureError, match=r"cannot be captured as one graph.*test_capture\.py:\d+ in forward"):
        capture(Branches().eval(), torch.ones(2, 4))


def test_origins_name_module_and_line():
    (node,) = [n for n in capture(nn.Sequential(Casts()).eval(), torch.randn(2, 4)).graph.calls if n.name == "linear"]
    assert str(node.meta["origin"]).startswith("0.layer, test_capture.py:")


def test_names_are_the_same_each_time():
    model, inputs = make("llama")
    assert [n.name for n in capture(model, inputs).graph.nodes] == [n.name for n in capture(model, inputs).graph.nodes]


def test_constants_have_the_models_names():
    model, inputs = make("encoder_decoder")  # its output layer is its embedding
    program = capture(model, inputs)
    assert "word.weight" in program.graph.constants
    assert set(program.graph.constants) <= set(model.state_dict())
    assert not any(tensor.requires_grad for tensor in program.graph.constants.values())
