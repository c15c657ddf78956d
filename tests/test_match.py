"""The pattern matcher: what is found, both orders of commutative ops, sharing, kinds of variables, several outputs, misses."""

import pytest
import torch

from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import RuleError
from paretorch.ir.types import TensorType
from paretorch.rewrites.match import Const, Match, Miss, Value, Weight, match_at, matches, record

X = TensorType("f32", (4, 8))


def norm(b: Builder, x: Value, weight: Value, eps: Value | float) -> Value:
    mean_square = b.mean(b.mul(x, x), dim=[-1], keepdim=True)
    return b.mul(b.mul(x, b.rsqrt(b.add(mean_square, eps))), weight)


def spelled(b, x, weight, swap=(False, False, False), other=None, eps=1e-6):
    def mul(left, right, swapped):
        return b.mul(right, left) if swapped else b.mul(left, right)

    square = mul(x, x if other is None else other, False)
    root = b.rsqrt(b.add(b.mean(square, [-1], True), eps))
    return mul(mul(x, root, swap[0]), weight, swap[1])


def found(pattern, graph):
    return [match for match in matches(record(pattern), graph) if isinstance(match, Match)]


@pytest.mark.parametrize("swap", [(a, b) for a in (False, True) for b in (False, True)])
def test_operands_of_commutative_ops_are_tried_both_ways(swap):
    graph = build("norm", lambda b, x, w: spelled(b, x, w, swap), x=X, w=TensorType("f32", (8,)))
    (match,) = found(norm, graph)
    assert (match.x.name, match.weight.name, match.eps) == ("x", "w", 1e-6)
    assert match.root is graph.outputs[0]
    assert [node.name for node in match.nodes] == [node.name for node in graph.calls]


def test_one_variable_stands_for_one_value():
    graph = build("norm", lambda b, x, w, y: spelled(b, x, w, other=y), x=X, w=TensorType("f32", (8,)), y=X)
    assert found(norm, graph) == []
    miss = match_at(record(norm), graph, graph.outputs[0])
    assert isinstance(miss, Miss)
    assert (miss.fitted, miss.of) == (6, 6)
    assert "stands for x in mul" in miss.reason


def test_a_value_may_stand_where_a_number_may():
    graph = build("norm", lambda b, x, w, e: spelled(b, x, w, eps=e), x=X, w=TensorType("f32", (8,)), e=TensorType("f32", ()))
    assert found(norm, graph)[0].eps.name == "e"


def test_attributes_that_the_pattern_leaves_out_have_their_defaults():
    def pattern(b: Builder, x: Value) -> Value:
        return b.gelu(x)

    plain = build("gelu", lambda b, x: b.gelu(x), x=X)
    tanh = build("gelu", lambda b, x: b.gelu(x, approximate="tanh"), x=X)
    assert len(found(pattern, plain)) == 1
    (miss,) = matches(record(pattern), tanh)
    assert str(miss) == "0 of 1 ops of the pattern fit at gelu: gelu (gelu) has an attribute that the pattern leaves at its default"


def test_weights_constants_and_numbers_are_told_apart():
    def weighed(b: Builder, x: Value, weight: Weight) -> Value:
        return b.mul(x, weight)

    def numbered(b: Builder, x: Value, factor: float) -> Value:
        return b.mul(x, factor)

    def summed(b: Builder, x: Value, dims: Const) -> Value:
        return b.sum(x, dims)

    def body(b, x):
        return b.mul(x, b.constant("w", torch.ones(8))), b.mul(x, x), b.mul(x, 2), b.sum(x, [0, 1])

    graph = build("kinds", body, x=X)
    assert [match.root.name for match in found(weighed, graph)] == ["mul"]
    assert [match.root.name for match in found(numbered, graph)] == ["mul_2"]
    assert found(numbered, graph)[0].factor == 2
    assert list(found(summed, graph)[0].dims) == [0, 1]


def test_an_absent_operand():
    def pattern(b: Builder, x: Value, weight: Value, bias: Value | None) -> Value:
        return b.linear(x, weight, bias)

    kind = TensorType("f32", (3, 8))
    graph = build("linear", lambda b, x, w: b.linear(x, w), x=X, w=kind)
    assert found(pattern, graph)[0].bias is None


def test_another_overload_is_matched_by_place():
    def pattern(b: Builder, x: Value, shape: Const) -> Value:
        return b.view(x, shape)

    graph = build("view", lambda b, x: b.call(torch.ops.aten.reshape.default, (x, [8, 4])), x=X)
    assert list(found(pattern, graph)[0].shape) == [8, 4]


def test_a_repeated_step_must_be_one_node():
    def pattern(b: Builder, x: Value) -> Value:
        root = b.exp(x)
        return b.add(root, b.neg(root))

    same = build("same", lambda b, x: (lambda e: b.add(e, b.neg(e)))(b.exp(x)), x=X)
    twice = build("twice", lambda b, x: b.add(b.exp(x), b.neg(b.exp(x))), x=X)
    assert len(found(pattern, same)) == 1
    assert found(pattern, twice) == []


def two(b: Builder, x: Value, y: Value, weight: Value) -> tuple[Value, Value]:
    total = b.add(x, y)
    return b.mul(b.exp(total), weight), total


def test_several_outputs():
    graph = build("two", lambda b, x, y, w: b.mul(b.exp(b.add(x, y)), w), x=X, y=X, w=X)
    (match,) = found(two, graph)
    assert [node.name for node in match.outputs] == ["mul", "add"]


def test_an_operand_that_is_computed_from_an_output_is_no_match():
    def body(b, x, y):
        total = b.add(x, y)
        return b.mul(b.exp(total), b.neg(total))

    graph = build("circle", body, x=X, y=X)
    assert found(two, graph) == []
    (miss,) = matches(record(two), graph)
    assert "computed from a value of the pattern" in miss.reason


def test_inner_values_that_others_use_are_named():
    def body(b, x, w):
        root = b.exp(x)
        return b.mul(root, w), b.neg(root)

    def pattern(b: Builder, x: Value, weight: Value) -> Value:
        return b.mul(b.exp(x), weight)

    graph = build("shared", body, x=X, w=X)
    assert found(pattern, graph)[0].escapes().name == "exp"


def test_order_is_that_of_the_graph():
    def pattern(b: Builder, x: Value) -> Value:
        return b.exp(x)

    graph = build("chain", lambda b, x: b.exp(b.exp(b.exp(x))), x=X)
    assert [match.root.name for match in found(pattern, graph)] == ["exp", "exp_1", "exp_2"]


def test_a_pattern_with_an_unknown_annotation_is_a_fault():
    def pattern(b: Builder, x: str) -> Value:
        return b.exp(x)

    with pytest.raises(RuleError, match="the variable 'x' is annotated <class 'str'>"):
        record(pattern)


def test_a_variable_that_is_not_there_is_named():
    graph = build("norm", lambda b, x, w: spelled(b, x, w), x=X, w=TensorType("f32", (8,)))
    with pytest.raises(AttributeError, match="the pattern has no variable 'gain'; it has x, weight, eps"):
        _ = found(norm, graph)[0].gain
