"""Normalize finds norms and activations in every spelling, and leaves what only looks like one."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paretorch.capture import capture
from paretorch.contest import relative_error
from paretorch.ir.ops import is_op
from paretorch.rewrites.normalize import normalize
from tests.graphs import Each, errors, names

C = 12


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred(x):
    return x - x.mean(-1, keepdim=True)


RMS = {
    "pow": lambda x, w, b: w * rms(x),
    "weight_left_inside": lambda x, w, b: (w * x) * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    "weight_on_root": lambda x, w, b: x * (torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w),
    "sqrt": lambda x, w, b: x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * w,
    "weight_then_sqrt": lambda x, w, b: w * x / torch.sqrt((x**2).mean(2, keepdim=True) + 1e-6),
    "one_over_sqrt": lambda x, w, b: x * (1 / torch.sqrt((x**2).mean(-1, True) + 1e-6)) * w,
    "power_of_minus_half": lambda x, w, b: x * ((x**2).mean(-1, True) + 1e-6) ** -0.5 * w,
    "power_of_half": lambda x, w, b: x / ((x**2).mean(-1, True) + 1e-6) ** 0.5 * w,
    "sum": lambda x, w, b: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / C + 1e-6) * w,
    "eps_left": lambda x, w, b: x * torch.rsqrt(1e-6 + x.pow(2).mean(-1, keepdim=True)) * w,
    "one_plus_weight": lambda x, w, b: rms(x) * (1.0 + w),
    "no_weight": lambda x, w, b: rms(x),
    "weight_with_axes": lambda x, w, b: rms(x) * w.view(1, 1, C),
    "library": lambda x, w, b: F.rms_norm(x, (C,), w, 1e-6),
}
LAYER = {
    "mean_of_square": lambda x, w, b: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5) * w + b,
    "var": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w + b,
    "var_correction": lambda x, w, b: w * centred(x) * torch.rsqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5) + b,
    "var_mean": lambda x, w, b: (lambda v, m: (x - m) * (v + 1e-5).rsqrt() * w + b)(*torch.var_mean(x, -1, correction=0, keepdim=True)),
    "no_weight": lambda x, w, b: centred(x) / (centred(x).square().mean(-1, True) + 1e-5).sqrt(),
    "sums": lambda x, w, b: (lambda d: b + w * (d / torch.sqrt((d * d).sum(-1, True) / C + 1e-5)))(x - x.sum(-1, True) / C),
    "library": lambda x, w, b: F.layer_norm(x, (C,), w, b, 1e-5),
}
NO_NORM = {
    "correction": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w + b,
    "another_axis": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
    "two_axes": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6) * w,
    "eps_outside": lambda x, w, b: x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6) * w,
    "eps_varies": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[:1, :1, :1].abs()) * w,
    "cube": lambda x, w, b: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w,
    "another_value": lambda x, w, b: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "another_mean": lambda x, w, b: (x - x.mean(1, True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w,
    "l2": lambda x, w, b: F.normalize(x, dim=-1) * w,
    "wrong_count": lambda x, w, b: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / (C - 1) + 1e-6) * w,
}
ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_erf_left": lambda x: 0.5 * x * (torch.erf(x * 0.7071067811865476) + 1),
    "gelu_cdf": lambda x: x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu_half_each": lambda x: x * (0.5 + 0.5 * torch.erf(x / math.sqrt(2.0))),
    "gelu_halved": lambda x: (1 + torch.erf(x / math.sqrt(2.0))) * x / 2,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_tanh_pow": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu_tanh_products": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "gelu_tanh_factored": lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x * x))),
    "gelu_tanh_as_sigmoid": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * torch.sigmoid(x),
    "silu_exp": lambda x: x / (1 + torch.exp(-x)),
    "silu_reciprocal": lambda x: x * (1 / (1 + torch.exp(-x))),
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "hardswish_gate": lambda x: x * (torch.clamp(x + 3, 0, 6) * (1 / 6)),
    "hardswish_sigmoid": lambda x: x * F.hardsigmoid(x),
}
NO_ACTIVATION = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "few_digits": lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142)),
    "another_value": lambda x: x * torch.sigmoid(x + 1),
    "no_half": lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "another_cube": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.0447 * torch.pow(x, 3.0)))),
    "another_power": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 2.0)))),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "another_clamp": lambda x: x * torch.clamp(x + 3, 0, 5) / 6,
}


@cache
def spelled(table: str, dtype: torch.dtype = torch.float64):
    """(program, normalized graph) of all the functions of a table at once."""
    torch.manual_seed(0)
    functions = list(globals()[table].values())
    weights = [torch.rand(C, dtype=dtype) + 0.5, torch.randn(C, dtype=dtype)] if "NORM" in table or table in ("RMS", "LAYER") else []
    program = capture(Each(functions, *weights).eval(), tuple(torch.randn(2, 3, C, dtype=dtype) for _ in functions))
    return program, normalize(program.graph)


def made_by(table: str, name: str, dtype: torch.dtype = torch.float64):
    """The node that makes the output of one function, after checking that output."""
    program, graph = spelled(table, dtype)
    place = list(globals()[table]).index(name)
    expected, found = program.run_original(*program.example)[place], graph.run(*program.example)[place]
    assert relative_error(expected, found) <= (1e-12 if dtype == torch.float64 else 1e-6)
    return graph, graph.outputs[place]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name, dtype):
    _, node = made_by("RMS", name, dtype)
    assert is_op(node, "rms_norm")
    assert node.args[0].op == "placeholder"
    assert (node.args[2] is None) == (name == "no_weight")


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name):
    _, node = made_by("LAYER", name)
    assert is_op(node, "layer_norm")
    assert node.args[0].op == "placeholder"
    assert (node.args[3] is None) == (name == "no_weight")


@pytest.mark.parametrize("name", NO_NORM)
def test_no_norm(name):
    _, node = made_by("NO_NORM", name)
    assert not is_op(node, "rms_norm", "layer_norm")
    assert not any(is_op(n, "rms_norm", "layer_norm") for n in spelled("NO_NORM")[1].calls)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    _, node = made_by("ACTIVATIONS", name)
    assert is_op(node, name.split("_")[0])
    assert node.args[0].op == "placeholder"
    if is_op(node, "gelu"):
        assert (dict(node.kwargs).get("approximate", "none") == "tanh") == ("tanh" in name)


@pytest.mark.parametrize("name", NO_ACTIVATION)
def test_no_activation(name):
    _, node = made_by("NO_ACTIVATION", name)
    assert not is_op(node, "gelu", "silu", "hardswish")


class NarrowNorm(nn.Module):
    """As decoder models have it: f32 inside, weight before or after the cast back."""

    def __init__(self, cast_first: bool, casts: bool = True):
        super().__init__()
        self.weight, self.cast_first, self.casts = nn.Parameter(torch.rand(C) + 0.5), cast_first, casts

    def forward(self, x):
        y = rms(x.float() if self.casts else x)
        return self.weight * y.to(x.dtype) if self.cast_first else (self.weight.float() * y).to(x.dtype)


@pytest.mark.parametrize("cast_first", [False, True])
def test_a_norm_in_f32_inside_a_narrow_model_keeps_its_casts(cast_first):
    program = capture(NarrowNorm(cast_first).bfloat16().eval(), torch.randn(2, 3, C).bfloat16())
    graph = normalize(program.graph)
    (norm,) = [node for node in graph.calls if is_op(node, "rms_norm")]
    assert norm.meta["val"].dtype == torch.float32
    assert names(graph).count("to") == 2
    assert errors(graph, program.run_original(*program.example), program.example) <= 1e-3  # one rounding of bf16 at most


def test_a_norm_that_rounds_at_each_step_is_left():
    program = capture(NarrowNorm(False, casts=False).bfloat16().eval(), torch.randn(2, 3, C).bfloat16())
    assert "rms_norm" not in names(normalize(program.graph))
