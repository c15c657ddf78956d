"""bf16 by region: what is cast and what is not, masks, shared weights, borders, refusals."""

import pytest
import torch

from paretorch.capture import capture
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.types import TensorType
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.precision.bf16 import LOWEST, MODEL, RULE
from tests.zoo import make

LOWEST_F32 = torch.finfo(torch.float32).min
DRIFT = 0.03  # a few layers of random weights; eight bits of mantissa are 0.004 for each value
CHANCE = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=CHANCE)


def f32(*shape):
    return TensorType("f32", shape)


def reduced(graph: Graph, site: str = MODEL) -> Graph:
    return apply_choice(RULE, graph, site, "bf16")


def dtypes(graph: Graph, *ops: str) -> set[torch.dtype]:
    return {node.meta["val"].dtype for node in graph.calls if is_op(node, *ops)}


def drift(before: Graph, after: Graph, *inputs) -> float:
    pairs = [(a, b) for a, b in zip(before.run(*inputs), after.run(*inputs), strict=True) if a.is_floating_point()]
    assert all(a.dtype == b.dtype and bool(b.isfinite().all()) for a, b in pairs)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


@pytest.mark.parametrize("name", ["vit_registers", "bert", "llama", "encoder_decoder", "convnext", "swin"])
def test_whole_models(name):
    model, inputs = make(name)
    program = capture(model, inputs)
    graph = normalize(program.graph)
    after = reduced(graph)
    assert drift(graph, after, *program.example) < DRIFT
    products = [node for node in after.calls if op_of(node).kind in ("matrix", "convolution", "attention")]
    assert {node.meta["val"].dtype for node in products} == {torch.bfloat16}
    assert [node.meta["val"].dtype for node in after.inputs] == [node.meta["val"].dtype for node in graph.inputs]
    assert [node.meta["val"].dtype for node in after.outputs] == [node.meta["val"].dtype for node in graph.outputs]


@pytest.mark.parametrize("step", [1, -1])
def test_neighbouring_blocks_share_no_casts_in_whichever_order(step):
    before = graph = transformer(Sizes(layers=3))
    for site in sites_of(RULE, before)[0][::step]:
        if site.name != MODEL:
            graph = reduced(graph, site.name)
    assert dtypes(graph, "linear", "attention") == {torch.bfloat16}
    casts = [node for node in graph.calls if is_op(node, "to")]
    assert not any(is_op(user, "to") for node in casts for user in node.users)
    assert len(casts) <= 3
    assert drift(before, graph, draw(2, 9, 8)) < DRIFT


def test_a_block_alone_leaves_the_rest_in_f32():
    before = transformer(Sizes(layers=2))
    site = sites_of(RULE, before)[0][1]
    after = reduced(before, site.name)
    assert dtypes(after, "linear") == {torch.bfloat16, torch.float32}
    assert drift(before, after, draw(2, 9, 8)) < DRIFT


@pytest.mark.parametrize("value", [LOWEST_F32, float("-inf")])
def test_an_input_mask_that_hides_a_whole_row_of_a_spelled_softmax(value):
    """Nothing but the largest finite number hides keys, so that a row of them is a mean and not NaN; so it stays in bf16."""

    def body(b, x, mask):
        scores = b.matmul(x, b.permute(x, [0, 2, 1]))
        return b.matmul(b.softmax(b.add(b.tanh(scores), mask), -1), x)

    before = build("spelled", body, x=f32(2, 5, 8), mask=f32(5, 5))
    mask = torch.zeros(5, 5)
    mask[1:, 3] = value
    mask[0] = LOWEST_F32
    assert drift(before, reduced(before), draw(2, 5, 8), mask) < DRIFT


def test_an_input_mask_of_attention():
    kind = f32(2, 2, 5, 4)
    before = build(
        "attention", lambda b, q, k, v, mask: b.attention(q, k, v, mask, scale=0.5), q=kind, k=kind, v=kind, mask=f32(2, 1, 1, 5)
    )
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 3:] = LOWEST_F32
    mask[1] = LOWEST_F32
    assert drift(before, reduced(before), draw(2, 2, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4), mask) < DRIFT


def test_numbers_beyond_the_range_that_stand_in_the_graph():
    def body(b, x, hidden):
        scores = b.masked_fill(b.matmul(x, b.permute(x, [0, 2, 1])), hidden, LOWEST_F32)
        return b.matmul(b.softmax(scores, -1), x)

    before = build("filled", body, x=f32(2, 5, 8), hidden=TensorType("bool", (5, 5)))
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = hidden[0, 1] = True
    after = reduced(before)
    assert drift(before, after, draw(2, 5, 8), hidden) < DRIFT
    assert next(node for node in after.calls if is_op(node, "masked_fill")).args[2] == LOWEST


def test_a_mask_made_of_an_input_of_integers():
    def body(b, x, seen):
        bias = b.mul(b.rsub(b.call(torch.ops.aten.to.dtype, (seen, torch.float32)), 1.0), LOWEST_F32)
        scores = b.add(b.matmul(x, b.permute(x, [0, 2, 1])), b.unsqueeze(bias, 1))
        return b.matmul(b.softmax(scores, -1), x)

    before = build("padded", body, x=f32(2, 5, 8), seen=TensorType("i64", (2, 5)))
    after = reduced(before)
    assert any(is_op(node, "clamp") for node in after.calls)
    assert drift(before, after, draw(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])) < DRIFT


def test_infinities_of_constants_stay_and_finite_numbers_stay_finite():
    values = torch.tensor([float("-inf"), LOWEST_F32, 0.0, float("inf")])
    before = build("mask", lambda b, x: b.add(b.matmul(x, x), b.constant("mask", values)), x=f32(4, 4))
    after = reduced(before)
    (constant,) = after.constants.values()
    assert constant.dtype == torch.bfloat16
    assert constant.tolist() == [float("-inf"), LOWEST, 0.0, float("inf")]


def test_key_bias_stays_wide():
    kind = f32(2, 2, 5, 4)
    before = build("sizes", lambda b, q, k, v, bias: b.attention(q, k, v, None, bias, scale=0.5), q=kind, k=kind, v=kind, bias=f32(2, 5))
    (attention,) = (node for node in reduced(before).calls if is_op(node, "attention"))
    assert [node.meta["val"].dtype for node in attention.all_input_nodes] == [*[torch.bfloat16] * 3, torch.float32]


def test_merged_tokens_keep_their_sizes_wide():
    before = transformer(Sizes(layers=3, tokens=13))
    (tome,) = rules_named(["tome"])
    site = sites_of(tome, before)[0][0]
    merged = apply_choice(tome, before, site.name, (site.values or tome.knobs)[1])
    after = reduced(merged)
    sizes = [node for node in after.calls if is_op(node, "log_size")]
    assert sizes
    assert dtypes(after, "log_size") == {torch.float32}
    assert drift(merged, after, draw(2, 13, 8)) < 0.3  # other tokens may merge


def test_a_weight_that_an_embedding_shares_and_layers_that_share_weights():
    table, weight = draw(31, 8), draw(8, 8)

    def body(b, ids):
        x = b.embedding(b.constant("table", table), ids)
        for _ in range(2):
            x = b.linear(x, b.constant("weight", weight))
        return b.linear(x, b.constant("table", table))

    before = build("tied", body, ids=TensorType("i64", (2, 3)))
    after = reduced(before)
    assert {name: tensor.dtype for name, tensor in after.constants.items()} == {
        "table": torch.float32, "weight_bf16": torch.bfloat16, "table_bf16": torch.bfloat16
    }  # fmt: skip
    assert dtypes(after, "embedding") == {torch.float32}
    again = reduced(before)
    assert all(again.constants[name] is tensor for name, tensor in after.constants.items()), "cast once"


def test_angles_are_no_products_worth_fewer_bits():
    def body(b: Builder, x, position):
        turns = b.matmul(b.constant("frequency", draw(1, 4, 1)), position)
        return b.mul(b.linear(x, b.constant("weight", draw(4, 8))), b.cos(b.permute(turns, [0, 2, 1])))

    before = build("rotary", body, x=f32(2, 600, 8), position=f32(2, 1, 600))
    after = reduced(before)
    assert dtypes(after, "matmul", "cos") == {torch.float32}
    position = torch.arange(600.0).expand(2, 1, 600)
    assert drift(before, after, draw(2, 600, 8), position) < DRIFT


def separated(b: Builder, x):
    for name in ("one", "two"):
        x = b.relu(b.linear(x, b.constant(name, draw(8, 8))))
        x = b.call(torch.ops.aten.special_bessel_j0.default, (x,))  # an op without a row
    return x


def test_ops_without_a_row_stay_wide_and_separate_regions():
    before = build("opaque", separated, x=f32(3, 8))
    after = reduced(before)
    wide = [node.meta["val"].dtype for node in after.calls if op_of(node) is None]
    assert wide == [torch.float32] * 2
    sites, _ = sites_of(RULE, before)
    assert [site.name for site in sites] == [MODEL, "linear..relu", "linear_1..relu_1"]
    half = reduced(before, "linear_1..relu_1")
    assert [node.meta["val"].dtype for node in half.calls if is_op(node, "linear")] == [torch.float32, torch.bfloat16]
    assert str(reduced(half, "linear..relu")) == str(after)
    assert drift(before, after, draw(3, 8)) < DRIFT


def test_outputs_of_integers_and_several_results():
    def body(b, x):
        y = b.linear(x, b.constant("weight", draw(8, 8)))
        top = b.topk(y, 2)
        return b.argmax(y, -1), b.item(top, 0), b.item(top, 1)

    before = build("places", body, x=f32(3, 8))
    after = reduced(before)
    assert [node.meta["val"].dtype for node in after.outputs] == [torch.int64, torch.float32, torch.int64]
    assert drift(before, after, draw(3, 8)) < DRIFT


@pytest.mark.parametrize(
    ("dtype", "sentence"), [("f64", "nothing to gain: its 1 products do not compute in f32"), ("bf16", "nothing to gain: its 1 products")]
)
def test_products_of_another_dtype_are_refused(dtype, sentence):
    graph = build("wide", lambda b, x: b.matmul(x, x), x=TensorType(dtype, (4, 4)))
    sites, (refusal,) = sites_of(RULE, graph)
    assert sites == []
    assert sentence in refusal.reason


def test_no_product_is_refused():
    _, (refusal,) = sites_of(RULE, build("sum", lambda b, x: b.add(x, x), x=f32(4)))
    assert refusal.reason == "nothing to gain: it has no matrix product, convolution or attention"


@pytest.mark.parametrize("site", ["add_99->add_100", "linear_7..relu_7"])
def test_a_region_that_is_gone_is_a_plan_error(site):
    with pytest.raises(PlanError, match=f"no f32 region is named {site} here"):
        reduced(transformer(), site)


@pytest.mark.parametrize(("name", "knob", "limit"), [("bf16", "bf16", DRIFT), ("int8", "int8", DRIFT), ("int4", 32, 0.25)])
def test_weights_that_were_edited_in_place_are_computed_again(name, knob, limit):
    """A model is planned for, trained on, and planned for again in one process."""
    graph, (rule,) = transformer(Sizes(2, 9, width=32)), rules_named([name])
    x = draw(2, 9, 32)
    first = apply_choice(rule, graph, MODEL, knob).run(x)[0]
    for weight in graph.constants.values():
        weight.mul_(1.5)
    second = apply_choice(rule, graph, MODEL, knob).run(x)[0]
    (expected,) = graph.run(x)
    assert float((second - expected).norm() / expected.norm()) < limit < float((first - expected).norm() / expected.norm())
