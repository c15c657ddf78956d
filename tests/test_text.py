"""The text form and its parser: golden text, round trips over the zoo and over rewritten graphs, and what damage is answered with."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder, build, fake_of, symbol_of
from paretorch.ir.errors import ArtifactError
from paretorch.ir.graph import Graph
from paretorch.ir.hash import structural_hash
from paretorch.ir.ops import aten
from paretorch.ir.parse import parse_graph
from paretorch.ir.text import print_graph, tensor_hash
from paretorch.ir.types import parse_type
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_choice, apply_rule, propose
from paretorch.rewrites.normalize import normalize
from tests.zoo import NAMES, make

LOSSY = tuple(rule for rule in RULES if not rule.is_exact)
QUICK = ("vit_class", "bert", "swin")  # of the zoo, with a dynamic batch; the others with --slow
slow = pytest.mark.slow


def same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Equal to the bit."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def round_trip(graph: Graph, *inputs: Tensor) -> Graph:
    """The parsed graph, which prints, hashes and computes the same."""
    text = print_graph(graph)
    parsed = parse_graph(text, graph.constants)
    assert print_graph(parsed) == text
    assert structural_hash(parsed, weights=True) == structural_hash(graph, weights=True)
    if inputs:
        assert same(parsed.run(*inputs), graph.run(*inputs))
    return parsed


@cache
def zoo_graph(name: str, dynamic: bool = False) -> tuple[Graph, tuple[Tensor, ...]]:
    model, inputs = make(name)
    dims = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs) if dynamic else None
    program = capture(model, inputs, dynamic_shapes=dims)
    return normalize(program.graph), tuple(program.example)


def small(b: Builder, x: Any) -> Any:
    weight = b.constant("norm.weight", torch.arange(4.0))
    centred = b.sub(x, b.mean(x, [-1], True))
    return b.mul(centred, weight), b.call(aten("argmax.default"), (centred, 1))


def test_print(golden):
    graph = build("centre", small, x=parse_type("f32[s7,4]"))
    golden(print_graph(graph))
    round_trip(graph, torch.randn(3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_zoo(name):
    graph, inputs = zoo_graph(name)
    round_trip(graph, *inputs)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=slow) for name in NAMES])
def test_zoo_with_any_batch(name):
    graph, inputs = zoo_graph(name, dynamic=True)
    parsed = round_trip(graph, *inputs)
    other = [torch.cat([tensor, tensor]) for tensor in inputs]
    assert same(parsed.run(*other), graph.run(*other))


@pytest.mark.parametrize("rule", LOSSY, ids=lambda rule: rule.name)
def test_rewritten(rule):
    graph, inputs = zoo_graph("vit_class")
    candidates, _ = propose(graph, analyze(graph), [rule])
    for candidate in candidates[:1]:
        for knob in candidate.knobs[:1]:
            round_trip(apply_choice(rule, graph, candidate.site.name, knob), *inputs)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_examples_of_rules(rule):
    before = rule.example()
    round_trip(before)
    if rule.is_exact:
        round_trip(apply_rule(rule, before)[0])


def everything(b: Builder, x: Any) -> Any:
    call = b.call
    mask = call(aten("gt.Scalar"), (x, 0.0))
    filled = call(aten("masked_fill.Scalar"), (x, mask, -torch.inf))
    clamped = call(aten("nan_to_num.default"), (filled, float("nan"), torch.inf))
    values = call(aten("topk.default"), (clamped, 2))
    cast = call(aten("to.dtype"), (b.item(values, 0), torch.bfloat16))
    copied = call(aten("clone.default"), (cast,), {"memory_format": torch.contiguous_format})
    picked = call(aten("index.Tensor"), (x, [None, b.item(values, 1)]))
    gelu = call(aten("gelu.default"), (picked,), {"approximate": "tanh"})
    summed = call(torch.ops.aten.einsum.default, ("abc->ab", [gelu]))
    opaque = call(aten("logcumsumexp.default"), (summed, 0))  # has no row
    rows = call(operator.pow, (call(aten("sym_size.int"), (x, 0)), 1))  # nor has this
    twice = call(operator.add, (call(operator.mul, (rows, 2)), 1))
    zeros = call(aten("full.default"), ([twice, 3], True), {"dtype": torch.bool})
    split = call(aten("split_with_sizes.default"), (x, [1, 3], 1))
    joined = b.cat([b.item(split, 1), b.item(split, 0)], 1)
    return copied, opaque, zeros, joined, None, rows, call(aten("mul.Tensor"), (joined, -1.5e-7)), call(aten("nonzero.default"), (mask,))


@pytest.mark.parametrize("rows", ["5", "s0"])
def test_every_kind_of_argument(golden, rows):
    graph = build("everything", everything, x=parse_type(f"f32[{rows},4]"))
    golden(print_graph(graph))
    round_trip(graph, torch.randn(5, 4))


def test_names_that_mean_something_else():
    """Constants and inputs may be called as numbers, dtypes, calls, arguments or each other."""
    graph = Graph("names")
    x = graph.input("input", fake_of(graph, parse_type("f32[2]")))
    for name in ("0.weight", "v0", "f32", "inf", "1e5", "a b", "a'b", "other", "x:y", "s0", "input"):
        x = graph.call(aten("add.Tensor"), (x, graph.add_constant(name, torch.randn(2))))
    graph.set_outputs((x,))
    round_trip(graph, torch.randn(2))


def test_equal_sizes_of_different_inputs():
    graph = Graph("sizes")
    x, y = (graph.input(name, fake_of(graph, parse_type(kind))) for name, kind in (("x", "f32[s1,11]"), ("y", "f32[s2,11]")))
    flat = graph.call(aten("view.default"), (x, [symbol_of(graph, "s1") * 11]))
    graph.set_outputs((graph.call(aten("cat.default"), ([x, y],)), flat))
    assert "view(x, size=[11*s0]) : f32[11*s0]" in str(graph)
    assert "f32[s0+s1,11]" in str(round_trip(graph))


def test_hashes_know_structure_and_not_names():
    def linear(x: str, weight: str, fill: float = 1.0) -> Graph:
        def function(b: Builder, **values: Any) -> Any:
            return b.linear(values[x], b.constant(weight, torch.full((3, 4), fill)), b.constant("relu", torch.ones(3)))

        return build("f", function, **{x: parse_type("f32[2,4]")})

    assert structural_hash(linear("x", "a")) == structural_hash(linear("relu", "linear", 2.0)) != structural_hash(normalized_relu())
    assert structural_hash(linear("x", "a"), weights=True) == structural_hash(linear("y", "z"), weights=True)
    assert structural_hash(linear("x", "a"), weights=True) != structural_hash(linear("x", "a", 2.0), weights=True)
    assert tensor_hash(torch.ones(4)) != tensor_hash(torch.ones(2, 2))


def normalized_relu() -> Graph:
    return normalize(capture(nn.ReLU().eval(), (torch.randn(2, 4),)).graph)


TEXT = "graph f(x: f32[4,6]) -> v1\nconst w : f32[6]\nv0 = add(x, w) : f32[4,6]\nv1 = mean(v0, dim=[-1]) : f32[4]\n"
DAMAGED = {
    "no header": (TEXT.partition("\n")[2], "line 1 .* form"),
    "cut": (TEXT[:70], "v1 is used but not defined"),
    "cut inside of a type": (TEXT[:-4], r"v1 says f32 but its type is f32\[4\]"),
    "cut inside of a line": (TEXT[:-14], "line 4 .* form"),
    "type": (TEXT.replace("-1]) : f32[4]", "-1]) : f32[4,1]"), r"line 4 .* v1 says f32\[4,1\] but its type is f32\[4\]"),
    "op": (TEXT.replace("mean(", "meen("), "line 4 .* no op named 'meen'"),
    "overload": (TEXT.replace("mean(", "mean:mean.foo("), "no overload 'mean.foo'"),
    "opaque op": (TEXT.replace("mean(", "aten::meen.dim("), "no op aten::meen.dim"),
    "argument": (TEXT.replace("dim=", "dimension="), "line 4 .* takes no dimension"),
    "order": ("\n".join([*TEXT.split("\n")[:2], *TEXT.split("\n")[3:1:-1]]), "v0 is used but not defined"),
    "twice": (TEXT.replace("v1 = ", "v0 = "), "v0 is defined twice"),
    "code": (TEXT.replace("[-1]", "__import__('os')"), "cannot read the value"),
    "input": (TEXT.replace("f32[4,6])", "f33[4,6])"), "cannot read the type"),
    "does not fit": (TEXT.replace("const w : f32[6]", "const w : f32[5]"), "does not fit"),
    "empty": ("", "line 1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage(case):
    text, message = DAMAGED[case]
    with pytest.raises(ArtifactError, match=message):
        parse_graph(text)


def test_constants_are_bound_by_name():
    assert parse_graph(TEXT).constants["w"].abs().sum() == 0
    with pytest.raises(ArtifactError, match="no tensor is given for the constant w"):
        parse_graph(TEXT, {})
    with pytest.raises(ArtifactError, match=r"w says f32\[6\] but its tensor is f32\[7\]"):
        parse_graph(TEXT, {"w": torch.zeros(7)})
    with pytest.raises(ArtifactError, match="w has hash 0123"):
        parse_graph(TEXT.replace("const w : f32[6]", "const w : f32[6] # 0123"), {"w": torch.zeros(6)})
