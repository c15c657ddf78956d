"""Rules that join linears, the near misses they refuse; all exact rules on whole models in float64."""

import pytest
import torch
from torch import nn

from paretorch.capture import capture
from paretorch.ir.builder import build
from paretorch.ir.ops import is_op
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_rule
from paretorch.rewrites.block_fusion import (
    fold_norm_affine,
    merge_linears,
    pack_linears,
)
from paretorch.rewrites.normalize import normalize
from tests.rule_checks import applies, constants, draw, f32, refused
from tests.zoo import make

WHOLE = ("layer_scale", "bert", "gpt", "llama", "parallel", "sandwich", "encoder_decoder", "convnext", "swin")


# linears


def test_merged_linears_must_take_fewer_operations():
    def body(b, x):
        return b.linear(b.linear(x, b.constant("down", draw(2, 8))), b.constant("up", draw(8, 2)))

    refused(merge_linears.RULE, build("adapter", body, x=f32(3, 8)), "one weight of 8x8 takes no fewer operations than 2x8 and 8x2")


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_linears_merge_with_and_without_biases(biases):
    def body(b, x):
        for name, shape, biased in zip("ab", ((8, 6), (4, 8)), biases, strict=True):
            x = b.linear(x, b.constant(name, draw(*shape)), *([b.constant(f"{name}_bias", draw(shape[0]))] if biased else []))
        return x

    assert len(applies(merge_linears.RULE, build("linears", body, x=f32(3, 6))).calls) == 1


def test_packing_takes_two_of_three_and_widths_that_differ():
    def body(b, x, given):
        parts = [b.linear(x, b.constant(name, draw(rows, 8))) for name, rows in (("query", 8), ("key", 4))]
        return *parts, b.linear(x, given), b.linear(x, *constants(b, value=draw(4, 8), bias=draw(4)))

    after = applies(pack_linears.RULE, build("heads", body, x=f32(2, 3, 8), given=f32(8, 8)))
    assert sum(is_op(node, "linear") for node in after.calls) == 2


def test_packing_turns_views_that_slices_forbid_into_reshapes():
    def body(b, x):
        one, two = (b.linear(x, b.constant(name, draw(8, 8))) for name in "ab")
        return b.view(one, [2, 24]), b.view(two, [2, 3, 2, 4]), b.view(b.view(one, [6, 8]), [48])

    after = applies(pack_linears.RULE, build("views", body, x=f32(2, 3, 8)))
    spelled = [node.target for node in after.calls if is_op(node, "view")]
    view, reshape = torch.ops.aten.view.default, torch.ops.aten.reshape.default
    assert spelled == [reshape, view, view, reshape]


def test_layers_that_share_weights_share_what_is_packed():
    def body(b, x):
        one, two, gain = draw(8, 8), draw(8, 8), draw(8)
        for _ in range(3):
            x = b.rms_norm(x, [8], b.constant("gain", gain), 1e-6)
            x = b.add(b.linear(x, b.constant("one", one)), b.relu(b.linear(x, b.constant("two", two))))
        return x

    graph = applies(fold_norm_affine.RULE, build("shared", body, x=f32(2, 8)), times=3)
    assert sorted(graph.constants) == ["one_scaled", "two_scaled"]
    assert sorted(applies(pack_linears.RULE, graph, times=3).constants) == ["one_scaled_packed"]


# whole models


def scrambled(model: nn.Module) -> nn.Module:
    """With norms and biases that are not at their initial ones and zeros."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=chance)
    return model.double()


@pytest.mark.parametrize("name", WHOLE)
def test_all_exact_rules_keep_whole_models(name):
    model, inputs = make(name)
    program = capture(scrambled(model), tuple(x.double() if x.is_floating_point() else x for x in inputs))
    graph = normalize(program.graph)
    expected = graph.run(*program.example)
    count = 0
    for rule in RULES:
        if rule.is_exact:
            graph, applied, _ = apply_rule(rule, graph)
            count += len(applied)
    assert count > 0
    for before, after in zip(expected, graph.run(*program.example), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
