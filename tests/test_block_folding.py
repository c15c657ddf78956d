"""Rules that fold scales, shifts, norms and biases into weights: the forms that each takes, the near misses refused with a sentence."""

import pytest
import torch

from paretorch.ir.builder import build
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.apply import sites_of
from paretorch.rewrites.block_fusion import (
    drop_key_bias,
    fold_batch_norm_affine,
    fold_conv_batch_norm,
    fold_norm_affine,
    fold_scale,
    fold_shift,
    fold_value_bias,
    hoist_scale,
)
from tests.rule_checks import applies, constants, draw, f32, refused
from tests.test_rules import doubled, error

# convolutions, linears and batch norm


def batch_norm(b, x, channels, training=False):
    gain, shift, mean, variance = constants(
        b, gain=draw(channels), shift=draw(channels), mean=draw(channels), variance=draw(channels) ** 2 + 0.5
    )
    return b.batch_norm(x, gain, shift, mean, variance, training, 0.1, 1e-5, False)


CONVOLUTIONS = {
    "bias": (torch.ops.aten.conv2d.default, (6, 4, 3, 3), True, ([1, 1], [1, 1])),
    "no bias": (torch.ops.aten.conv2d.default, (6, 4, 3, 3), False, ([2, 2],)),
    "depthwise": (torch.ops.aten.conv2d.default, (4, 1, 3, 3), False, ([1, 1], [1, 1], [1, 1], 4)),
    "groups": (torch.ops.aten.conv2d.default, (6, 2, 3, 3), True, ([1, 1], [1, 1], [1, 1], 2)),
    "same padding": (torch.ops.aten.conv2d.padding, (6, 4, 3, 3), True, ([1, 1], "same")),
    "transposed": (torch.ops.aten.conv_transpose2d.input, (4, 6, 3, 3), True, ([2, 2],)),
    "transposed groups": (torch.ops.aten.conv_transpose2d.input, (4, 3, 3, 3), False, ([2, 2], [0, 0], [0, 0], 2)),
    "general": (torch.ops.aten.convolution.default, (6, 4, 3, 3), True, ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "general transposed": (torch.ops.aten.convolution.default, (4, 3, 3, 3), True, ([1, 1], [0, 0], [1, 1], True, [0, 0], 2)),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_convolutions_take_batch_norms(form):
    target, shape, biased, rest = CONVOLUTIONS[form]
    transposed = "transposed" in form
    channels = shape[1] * (2 if "groups" in form or form == "general transposed" else 1) if transposed else shape[0]

    def body(b, x):
        bias = b.constant("bias", draw(channels)) if biased else None
        return batch_norm(b, b.call(target, (x, b.constant("weight", draw(*shape)), bias, *rest)), channels)

    after = applies(fold_conv_batch_norm.RULE, build("conv", body, x=f32(2, 4, 7, 7)))
    assert len(after.calls) == 1


def test_linears_take_batch_norms_over_two_axes_only():
    def body(b, x):
        return batch_norm(b, b.linear(x, b.constant("weight", draw(6, 4))), 6)

    applies(fold_conv_batch_norm.RULE, build("linear", body, x=f32(3, 4)))
    refused(
        fold_conv_batch_norm.RULE,
        build("linear", body, x=f32(3, 6, 4)),
        "the norm's channels are axis 1 of 3, the linear's outputs are the last",
    )


def test_a_convolution_that_others_read_keeps_its_norm():
    def body(b, x):
        conv = b.convolution(x, b.constant("weight", draw(6, 4, 3, 3)))
        return batch_norm(b, conv, 6), b.relu(conv)

    refused(fold_conv_batch_norm.RULE, build("shared", body, x=f32(2, 4, 7, 7)), "conv2d has 2 users; the others need it before the norm")


@pytest.mark.parametrize("rule", [fold_conv_batch_norm.RULE, fold_batch_norm_affine.RULE], ids=lambda rule: rule.name)
def test_statistics_of_the_batch_are_no_constants(rule):
    graph = build("train", lambda b, x: batch_norm(b, b.convolution(x, b.constant("w", draw(6, 4, 3, 3))), 6, True), x=f32(2, 4, 7, 7))
    refused(rule, graph, "takes its statistics from the batch")


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 3)])
def test_lonely_batch_norms_become_scale_and_shift(shape):
    after = applies(fold_batch_norm_affine.RULE, build("norm", lambda b, x: batch_norm(b, x, 4), x=f32(*shape)))
    assert [is_op(node, "mul", "add") for node in after.calls] == [True, True]


# scales and shifts


@pytest.mark.parametrize(
    "scale", [0.5, draw(6), draw(1), draw(1, 1, 6), torch.tensor(2.0)], ids=["number", "channel", "one", "row", "scalar"]
)
@pytest.mark.parametrize("division", [False, True])
def test_scales_fold(scale, division):
    def body(b, x):
        factor = b.constant("scale", scale) if isinstance(scale, torch.Tensor) else scale
        y = b.linear(x, *constants(b, weight=draw(6, 4), bias=draw(6)))
        return b.div(y, factor) if division else b.mul(y, factor)

    assert len(applies(fold_scale.RULE, build("scale", body, x=f32(2, 3, 4))).calls) == 1


def test_a_scale_by_row_is_refused():
    def body(b, x):
        return b.mul(b.linear(x, b.constant("weight", draw(6, 4))), b.constant("scale", draw(3, 1)))

    refused(fold_scale.RULE, build("scale", body, x=f32(2, 3, 4)), "the scale is f32[3,1]; only one factor per output channel of f32[6]")


def test_a_linear_that_others_read_keeps_its_scale():
    def body(b, x):
        y = b.linear(x, b.constant("weight", draw(6, 4)))
        return b.mul(y, 2.0), b.relu(y)

    refused(fold_scale.RULE, build("scale", body, x=f32(2, 3, 4)), "linear has 2 users; the others need it unscaled")


@pytest.mark.parametrize("shift", [0.5, draw(6), draw(1)], ids=["number", "channel", "one"])
@pytest.mark.parametrize("biased", [False, True])
def test_shifts_fold(shift, biased):
    def body(b, x):
        y = b.linear(x, b.constant("weight", draw(6, 4)), *(constants(b, bias=draw(6)) if biased else []))
        return b.add(b.constant("shift", shift), y) if isinstance(shift, torch.Tensor) else b.add(y, shift)

    assert len(applies(fold_shift.RULE, build("shift", body, x=f32(2, 3, 4))).calls) == 1


def test_positions_are_no_shift_and_residuals_are_passed_over():
    def positions(b, x):
        return b.add(b.linear(x, b.constant("weight", draw(6, 4))), b.constant("positions", draw(3, 6)))

    refused(
        fold_shift.RULE,
        build("positions", positions, x=f32(2, 3, 4)),
        "the shift is f32[3,6]; only one number per output channel, of f32[6]",
    )
    residual = build("residual", lambda b, x: b.add(x, b.linear(x, b.constant("weight", draw(4, 4)))), x=f32(2, 3, 4))
    assert sites_of(fold_shift.RULE, residual) == ([], [])


def test_a_linear_that_others_read_keeps_its_shift():
    def body(b, x):
        y = b.linear(x, b.constant("weight", draw(6, 4)))
        return b.add(y, 1.0), b.relu(y)

    refused(fold_shift.RULE, build("shift", body, x=f32(2, 3, 4)), "linear is also used by relu, so it would be computed twice")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("division", [False, True])
def test_numbers_on_query_or_key_are_hoisted_through_views(place, division):
    def body(b, x, k, v):
        heads = b.permute(b.view(b.div(x, 4.0) if division else b.mul(x, 0.5), [2, 5, 2, 4]), [0, 2, 1, 3])
        return b.attention(*((heads, k) if place == 0 else (k, heads)), v, scale=0.25)

    after = applies(hoist_scale.RULE, build("heads", body, x=f32(2, 5, 8), k=f32(2, 2, 5, 4), v=f32(2, 2, 5, 4)))
    assert after.calls[-1].kwargs["scale"] == (0.0625 if division else 0.125)


def test_a_scaled_value_or_a_shared_query_is_not_hoisted():
    kind = f32(2, 2, 5, 4)
    value = build("value", lambda b, q, k, v: b.attention(q, k, b.mul(v, 2.0), scale=1.0), q=kind, k=kind, v=kind)

    def both(b, q, k, v):
        q = b.mul(q, 2.0)
        return b.attention(q, k, v, scale=1.0), q

    for graph in (value, build("both", both, q=kind, k=kind, v=kind)):
        assert sites_of(hoist_scale.RULE, graph) == ([], [])


# norms


def test_a_norm_that_is_more_than_an_operand_of_linears_keeps_its_affine():
    def norm_of(b, x):
        return b.layer_norm(x, [8], *constants(b, gain=draw(8), shift=draw(8)))

    def residual(b, x):
        y = norm_of(b, x)
        return b.add(y, b.linear(y, b.constant("weight", draw(8, 8))))

    refused(fold_norm_affine.RULE, build("post", residual, x=f32(2, 3, 8)), "add reads the norm as well and is no linear")

    def two_axes(b, x):
        y = b.layer_norm(x, [3, 8], *constants(b, gain=draw(3, 8), shift=draw(3, 8)))
        return b.linear(y, b.constant("weight", draw(8, 8)))

    refused(fold_norm_affine.RULE, build("axes", two_axes, x=f32(2, 3, 8)), "it normalises 2 axes; a linear scales only the last")


def test_a_weight_that_an_embedding_shares_is_not_copied():
    def body(b, ids):
        table = draw(31, 8)
        x = b.rms_norm(b.embedding(b.constant("table", table), ids), [8], b.constant("gain", draw(8)), 1e-6)
        return b.linear(x, b.constant("table", table))

    graph = build("tied", body, ids=TensorType("i64", (2, 3)))
    refused(fold_norm_affine.RULE, graph, "embedding shares the weight f32[31,8] of linear; a scaled copy would be kept beside it")


# attention


def attend(b, x, *, turn=None, split=None, softcap=0.0, mask=None, right=-1, extra=False):
    def heads(name):
        y = b.linear(x, *constants(b, **{name: draw(8, 8), f"{name}_bias": draw(8)}))
        return y, split(b, y) if split else b.permute(b.view(y, [2, 4, 2, 4]), [0, 2, 1, 3])

    (_, q), (key, k), (_, v) = heads("query"), heads("key"), heads("value")
    mixed = b.attention(q, turn(b, k) if turn else k, v, mask, scale=0.5, softcap=softcap, right=right)
    joined = b.call(torch.ops.aten.reshape.default, (b.permute(mixed, [0, 2, 1, 3]), [2, 4, 8]))
    out = b.linear(joined, *constants(b, out=draw(8, 8), out_bias=draw(8)))
    return (out, key) if extra else out


def attention_graph(**options):
    return build("attention", lambda b, x: attend(b, x, **options), x=f32(2, 4, 8))


def test_key_bias_goes_under_any_mask():
    applies(drop_key_bias.RULE, attention_graph(right=0))
    masked = build("masked", lambda b, x, mask: attend(b, x, mask=mask), x=f32(2, 4, 8), mask=f32(2, 1, 4, 4))
    applies(drop_key_bias.RULE, masked)


def test_key_bias_stays_under_a_soft_cap_or_with_other_users():
    refused(drop_key_bias.RULE, attention_graph(softcap=30.0), "attention caps its scores at 30.0")
    refused(drop_key_bias.RULE, attention_graph(extra=True), "output reads the projection as well and is no attention")


def test_key_bias_stays_where_positions_turn_the_key():
    def rotary(b, k):
        return b.mul(k, b.constant("cos", draw(4, 4)))

    assert sites_of(drop_key_bias.RULE, attention_graph(turn=rotary)) == ([], [])


def test_key_bias_stays_where_views_deal_channels_to_keys():
    graph = attention_graph(split=lambda b, y: b.view(y, [2, 2, 4, 4]))  # no permute: half of the tokens' channels become a head
    refused(drop_key_bias.RULE, graph, "deal its channels to the axis of keys, so its bias differs between keys")
    assert error(doubled(graph), doubled(drop_key_bias.rewrite(graph, sites_named("linear_1"), None))) > 1e-3


def sites_named(name):
    from paretorch.rewrites.rule import Site

    return Site(name)


def test_value_bias_passes_where_every_row_sees_a_key():
    applies(fold_value_bias.RULE, attention_graph(right=0))
    band = torch.ones(4, 4, dtype=torch.bool).tril()
    for mask in (band, torch.zeros(4, 4).masked_fill(~band, float("-inf"))):
        applies(fold_value_bias.RULE, build("masked", lambda b, x, m=mask: attend(b, x, mask=b.constant("mask", m)), x=f32(2, 4, 8)))


def test_value_bias_stays_where_a_row_may_see_nothing():
    sentence = "a mask may hide every key of a row"
    given = build("masked", lambda b, x, mask: attend(b, x, mask=mask), x=f32(2, 4, 8), mask=f32(2, 1, 4, 4))
    refused(fold_value_bias.RULE, given, sentence)
    nothing = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    refused(fold_value_bias.RULE, build("strict", lambda b, x: attend(b, x, mask=b.constant("mask", nothing)), x=f32(2, 4, 8)), sentence)
