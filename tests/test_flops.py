"""Flops of the op table: of whole models as torch's own counter gives them, of single ops by arithmetic that stands here."""

from __future__ import annotations

from math import prod

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paretorch.capture import capture
from paretorch.cost_model.work import RATED_BY_FLOPS
from paretorch.ir.builder import build
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten, op_of
from paretorch.ir.ops.costs import value_type
from paretorch.ir.types import TensorType
from paretorch.rewrites.normalize import normalize
from tests import tiny_transformers
from tests.graphs import zoo_normal, zoo_program
from tests.zoo import NAMES, make


def counted(function) -> int:
    """Flops by torch's counter. It sees products and convolutions only, attention as the two products of its spelled form."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


def flops(graph: Graph, kinds=RATED_BY_FLOPS):
    """Flops by our table, of the kinds that the counter sees."""
    rows = [(node, op_of(node)) for node in graph.calls]
    return sum(op.flops(node) for node, op in rows if op is not None and op.kind in kinds)


def last(graph: Graph):
    """Flops of the last call, of whatever kind."""
    return op_of(graph.calls[-1]).flops(graph.calls[-1])


def graph_of(function, *shapes) -> Graph:
    """The graph of a function of a builder and of inputs of these shapes; a type stands for itself."""
    types = [shape if isinstance(shape, TensorType) else TensorType("f32", shape) for shape in shapes]
    return build("g", lambda b, **values: function(b, *values.values()), **{f"x{place}": type_ for place, type_ in enumerate(types)})


def zeros(graph: Graph) -> list[Tensor]:
    return [torch.zeros(tuple(node.meta["val"].shape), dtype=node.meta["val"].dtype) for node in graph.inputs]


def emit(overload: str, *arguments, **attributes):
    """A call of that overload with the inputs in front."""
    return lambda b, *inputs: b.call(aten(overload), (*inputs, *arguments), attributes)


# whole models


@pytest.mark.parametrize("name", NAMES)
def test_the_zoo(name):
    model, inputs = make(name)
    expected = counted(lambda: model(*inputs))
    assert flops(zoo_program(name).graph) == expected
    assert flops(zoo_normal(name)) == expected


# The experts of mixtral are one opaque op, which neither side looks into.
TRANSFORMERS = [name for name in tiny_transformers.NAMES if name != "mixtral"]
QUICK = ("gemma3",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRANSFORMERS])
def test_transformers(name):
    model, inputs = tiny_transformers.make(name)
    expected = counted(lambda: model(**inputs))
    graph = capture(model, inputs).graph
    assert flops(graph) == expected
    assert flops(normalize(graph)) == expected


def test_a_causal_model_by_hand():
    """zoo's gpt: B=3, T=10, C=24, H=4, two blocks, 31 words. Scores count the whole square of T x T, hidden or not, as torch counts them."""
    rows = 3 * 10
    products = 2 * rows * 24 * (3 * 24) + 2 * rows * 24 * 24 + 2 * rows * 24 * 48 + 2 * rows * 48 * 24
    scores = mixing = 2 * (3 * 4) * 10 * 10 * 6
    expected = 2 * (products + scores + mixing) + 2 * rows * 24 * 31
    assert flops(zoo_program("gpt").graph) == flops(zoo_normal("gpt")) == expected == 655200


# products, each by 2 * m * k * n

PRODUCTS = {
    "linear": (emit("linear.default"), [(6, 5), (7, 5), (7,)], 2 * 6 * 5 * 7),
    "linear without bias": (emit("linear.default"), [(6, 5), (7, 5)], 2 * 6 * 5 * 7),
    "linear of a batch": (emit("linear.default"), [(2, 3, 5), (7, 5), (7,)], 2 * (2 * 3) * 5 * 7),
    "matmul of a batch and a matrix": (emit("matmul.default"), [(2, 4, 3, 5), (5, 7)], 2 * (2 * 4 * 3) * 5 * 7),
    "matmul of a matrix and a batch": (emit("matmul.default"), [(3, 5), (2, 4, 5, 7)], 2 * 4 * 2 * 3 * 5 * 7),
    "matmul of batches": (emit("matmul.default"), [(2, 4, 3, 5), (2, 4, 5, 7)], 2 * (2 * 4) * 3 * 5 * 7),
    "matmul of broadcast batches": (emit("matmul.default"), [(1, 4, 3, 5), (2, 1, 5, 7)], 2 * (2 * 4) * 3 * 5 * 7),
    "mm": (emit("mm.default"), [(6, 5), (5, 7)], 2 * 6 * 5 * 7),
    "bmm": (emit("bmm.default"), [(4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
    "addmm": (emit("addmm.default"), [(7,), (6, 5), (5, 7)], 2 * 6 * 5 * 7),
    "baddbmm": (emit("baddbmm.default"), [(4, 1, 7), (4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
    "tall product": (emit("mm.default"), [(6, 1), (1, 7)], 2 * 6 * 1 * 7),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_by_hand(name):
    function, shapes, expected = PRODUCTS[name]
    graph = graph_of(function, *shapes)
    assert last(graph) == expected == counted(lambda: graph.run(*zeros(graph)))


UNSEEN = {
    "vector and matrix": (emit("matmul.default"), [(5,), (5, 7)], 2 * 5 * 7),
    "matrix and vector": (emit("matmul.default"), [(6, 5), (5,)], 2 * 6 * 5),
    "batch and vector": (emit("matmul.default"), [(2, 6, 5), (5,)], 2 * 2 * 6 * 5),
    "two vectors": (emit("matmul.default"), [(5,), (5,)], 2 * 5),
    "linear of a vector": (emit("linear.default"), [(5,), (7, 5)], 2 * 5 * 7),
    "mv": (emit("mv.default"), [(6, 5), (5,)], 2 * 6 * 5),
    "dot": (emit("dot.default"), [(5,), (5,)], 2 * 5),
    "addmv": (emit("addmv.default"), [(6,), (6, 5), (5,)], 2 * 6 * 5),
    "addbmm": (emit("addbmm.default"), [(3, 7), (4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
    "outer": (emit("outer.default"), [(6,), (7,)], 6 * 7),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_the_counter_does_not_see_by_hand(name):
    """It has no formula for products with vectors."""
    function, shapes, expected = UNSEEN[name]
    assert last(graph_of(function, *shapes)) == expected


EINSUMS = {  # equation, shapes, path: arithmetic, None where the counter sees no product
    "batch": ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], None, 2 * 2 * 3 * 4 * 5),
    "no arrow": ("bij,bjk", [(2, 3, 4), (2, 4, 5)], None, 2 * 2 * 3 * 4 * 5),
    "ellipsis": ("...ij,jk->...ik", [(2, 6, 3, 4), (4, 5)], None, 2 * (2 * 6) * 3 * 4 * 5),
    "dropped ellipsis": ("...i,...i->i", [(2, 3), (2, 3)], None, 2 * 2 * 3),
    "all": ("ij,ij->", [(3, 4), (3, 4)], None, 2 * 3 * 4),
    "from the left": ("ij,jk,kl->il", [(2, 30), (30, 4), (4, 5)], None, 2 * 2 * 30 * 4 + 2 * 2 * 4 * 5),
    "by a path": ("ij,jk,kl->il", [(2, 30), (30, 4), (4, 5)], [1, 2, 0, 1], 2 * 30 * 4 * 5 + 2 * 2 * 30 * 5),
    "summed before": ("tcd,chd->t", [(2, 3, 4), (3, 5, 4)], None, 2 * 2 * 3 * 4),
    "length one": ("btc,cd->btd", [(2, 3, 4), (1, 5)], None, 2 * 3 * 5),
    "outer": ("bi,bj->bij", [(2, 3), (2, 4)], None, 2 * 3 * 4),
    "transposed": ("ij->ji", [(2, 3)], None, 0),
}  # fmt: skip
NO_PRODUCT = ("length one", "outer")  # torch multiplies elements where nothing is contracted, once each


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_by_hand(name):
    equation, shapes, path, expected = EINSUMS[name]
    graph = graph_of(lambda b, *inputs: b.call(aten("einsum.default"), (equation, list(inputs)), {"path": path}), *shapes)
    assert last(graph) == expected
    assert counted(lambda: graph.run(*zeros(graph))) == (0 if name in NO_PRODUCT else expected)


@pytest.mark.parametrize(("gates", "row"), [(4, "lstm.input"), (3, "gru.input"), (1, "rnn_tanh.input")])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_by_hand(gates, row, directions):
    """x[B=2, T=3, 5] through one layer of width 7: for each step and direction, one matrix of the input and one of the state."""
    shapes = [(gates * 7, 5), (gates * 7, 7), (gates * 7,), (gates * 7,)] * directions
    state = (directions, 2, 7)

    def body(b, x, first, cell, *weights):
        start = [first, cell] if gates == 4 else first
        return b.item(b.call(aten(row), (x, start, list(weights), True, 1, 0.0, False, directions == 2, True)), 0)

    graph = graph_of(body, (2, 3, 5), state, state, *shapes)
    assert flops(graph) == directions * 2 * (2 * 3) * (5 * gates * 7 + 7 * gates * 7)


# convolutions: 2 * outputs * (inputs of a group) * taps; transposed, 2 * inputs * (outputs of a group) * taps

CONVOLUTIONS = {
    "plain": ("conv2d.default", [(2, 4, 9, 7), (6, 4, 3, 3), (6,)], (), 2 * (2 * 6 * 7 * 5) * 4 * 9),
    "stride": ("conv2d.default", [(2, 4, 9, 7), (6, 4, 3, 3), (6,)], ([2, 2],), 2 * (2 * 6 * 4 * 3) * 4 * 9),
    "padding": ("conv2d.default", [(2, 4, 9, 7), (6, 4, 3, 3), (6,)], ([1, 1], [1, 1]), 2 * (2 * 6 * 9 * 7) * 4 * 9),
    "same padding": ("conv2d.padding", [(2, 4, 9, 7), (6, 4, 3, 3), (6,)], ([1, 1], "same"), 2 * (2 * 6 * 9 * 7) * 4 * 9),
    "dilation": ("conv2d.default", [(2, 4, 9, 7), (6, 4, 3, 3), (6,)], ([1, 1], [0, 0], [2, 2]), 2 * (2 * 6 * 5 * 3) * 4 * 9),
    "all": ("conv2d.default", [(2, 4, 9, 7), (6, 2, 3, 3), (6,)], ([2, 1], [2, 1], [2, 1], 2), 2 * (2 * 6 * 5 * 7) * 2 * 9),
    "depthwise": ("conv2d.default", [(2, 4, 9, 7), (4, 1, 3, 3), (4,)], ([1, 1], [1, 1], [1, 1], 4), 2 * (2 * 4 * 9 * 7) * 1 * 9),
    "pointwise": ("conv2d.default", [(2, 4, 9, 7), (6, 4, 1, 1)], (), 2 * (2 * 6 * 9 * 7) * 4),
    "one axis": ("conv1d.default", [(2, 4, 9), (6, 4, 3), (6,)], ([2],), 2 * (2 * 6 * 4) * 4 * 3),
    "three axes": ("conv3d.default", [(2, 4, 5, 5, 5), (6, 4, 3, 3, 3)], (), 2 * (2 * 6 * 3 * 3 * 3) * 4 * 27),
    "no batch": ("conv2d.default", [(4, 9, 7), (6, 4, 3, 3), (6,)], (), 2 * (6 * 7 * 5) * 4 * 9),
    "transposed": ("conv_transpose2d.input", [(2, 4, 9, 7), (4, 6, 3, 3), (6,)], (), 2 * (2 * 4 * 9 * 7) * 6 * 9),
    "transposed, stride": ("conv_transpose2d.input", [(2, 4, 9, 7), (4, 6, 2, 2), (6,)], ([2, 2],), 2 * (2 * 4 * 9 * 7) * 6 * 4),
    "transposed, groups": ("conv_transpose2d.input", [(2, 4, 9, 7), (4, 3, 3, 3), (6,)], ([2, 2], [1, 1], [1, 1], 2),
                           2 * (2 * 4 * 9 * 7) * 3 * 9),
    "transposed, one axis": ("conv_transpose1d.default", [(2, 4, 9), (4, 6, 3), (6,)], ([2],), 2 * (2 * 4 * 9) * 6 * 3),
    "general": ("convolution.default", [(2, 4, 9, 7), (6, 2, 3, 3), (6,)], ([1, 1], [1, 1], [1, 1], False, [0, 0], 2),
                2 * (2 * 6 * 9 * 7) * 2 * 9),
    "general transposed": ("convolution.default", [(2, 4, 9, 7), (4, 3, 3, 3), (6,)], ([1, 1], [1, 1], [1, 1], True, [0, 0], 2),
                           2 * (2 * 4 * 9 * 7) * 3 * 9),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_by_hand(name):
    overload, shapes, attributes, expected = CONVOLUTIONS[name]
    graph = graph_of(emit(overload, *([] if len(shapes) == 3 else [None]), *attributes), *shapes)
    assert last(graph) == expected == counted(lambda: graph.run(*zeros(graph)))


# attention: 2 * Tq * Tk * D for the scores and 2 * Tq * Tk * Dv for the mixing, for each head

Q, K, V = (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)
ATTENTIONS = {
    "plain": (lambda b, q, k, v: b.attention(q, k, v, scale=1.0), [Q, K, V], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
    "grouped": (lambda b, q, k, v: b.attention(q, k, v, scale=1.0), [Q, (2, 2, 5, 8), (2, 2, 5, 6)], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
    "masked": (lambda b, q, k, v, m: b.attention(q, k, v, m, scale=1.0), [Q, K, V, (1, 1, 3, 5)], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
    "causal": (lambda b, q: b.attention(q, q, q, scale=1.0, right=0), [Q], 2 * (2 * 4) * 3 * 3 * (8 + 8)),
    "window": (lambda b, q: b.attention(q, q, q, scale=1.0, left=1, right=1, sinks=1), [Q], 2 * (2 * 4) * 3 * 3 * (8 + 8)),
    "capped": (lambda b, q, k, v: b.attention(q, k, v, scale=1.0, softcap=5.0), [Q, K, V], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
    "torch's": (emit("scaled_dot_product_attention.default"), [Q, K, V], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
    "torch's, causal": (emit("scaled_dot_product_attention.default", None, 0.0, True), [Q, Q, Q], 2 * (2 * 4) * 3 * 3 * (8 + 8)),
    "one query for a batch": (emit("scaled_dot_product_attention.default"), [(1, 4, 3, 8), K, V], 2 * (2 * 4) * 3 * 5 * (8 + 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_by_hand(name):
    function, shapes, expected = ATTENTIONS[name]
    graph = graph_of(function, *shapes)
    assert last(graph) == expected == counted(lambda: graph.run(*zeros(graph)))


@pytest.mark.parametrize(
    ("tokens", "sinks", "expected"),
    [
        (8, 0, 2 * (2 * 4) * (2 * 4) * (3 + 4 + 1) * (6 + 6)),  # two blocks of four queries, each sees 3 + 4 + 1 keys
        (10, 2, 2 * (2 * 4) * (3 * 4) * (2 + 3 + 4 + 1) * (6 + 6)),  # three blocks, the last one padded; two sinks each
        (3, 5, 2 * (2 * 4) * (1 * 4) * (3 + 3 + 4 + 1) * (6 + 6)),  # no more sinks than tokens
    ],
)
def test_local_attention_by_hand(tokens, sinks, expected):
    def body(b, q, k):
        return b.local_attention(q, k, k, scale=1.0, left=3, right=1, sinks=sinks, block=4)

    graph = graph_of(body, (2, 4, tokens, 6), (2, 2, tokens, 6))
    assert last(graph) == expected == counted(lambda: graph.run(*zeros(graph)))


def test_token_matching_by_hand():
    """Seventeen tokens, one protected: cosines of eight with eight; three are merged into the fourteen that stay."""

    def body(b, x):
        match = b.match_tokens(x, None, 3, 1)
        return b.item(b.merge_tokens(x, *(b.item(match, place) for place in range(3))), 0)

    graph = graph_of(body, (2, 17, 6))
    cosines, one_hot, shares = 2 * 2 * 8 * 8 * 6, 2 * 2 * 14 * 3 * 6, 2 * 14 * 6
    assert flops(graph, ("matrix",)) == cosines
    assert flops(graph, ("gather",)) == one_hot + shares
    assert counted(lambda: graph.run(*zeros(graph))) == cosines + one_hot


def test_scoped_merging_by_hand():
    """Twelve tokens of width six: cosines of nine with three; windows of six, three destinations of twelve tokens in two of them."""

    def match(b, x):
        to, away = b.constant("destinations", torch.tensor([0, 4, 8])), b.constant("sources", torch.tensor([1, 2, 3, 5, 6, 7, 9, 10, 11]))
        return b.item(b.match_to_places(x, None, to, away, 4), 0)

    graph = graph_of(match, (2, 12, 6))
    assert flops(graph) == counted(lambda: graph.run(*zeros(graph))) == 2 * 2 * 9 * 3 * 6

    def share(b, x):
        shares = b.assign_tokens(x, None, b.constant("windows", torch.arange(12).reshape(2, 6)), 3, 0, 0.1)
        return b.unmerge_by_map(b.item(b.merge_by_map(x, shares), 0), shares)

    graph = graph_of(share, (2, 12, 6))
    cosines, scores, products = 2 * 2 * 2 * 6 * 6 * 6, 2 * 2 * 6 * 12 * 6, 2 * (2 * 2 * 6 * 12 * 6)
    steps = 4 * (2 * 2 * 6 * 6) * 3
    assert counted(lambda: graph.run(*zeros(graph))) == cosines + scores + products
    assert flops(graph) == cosines + scores + products + steps


# light ops: what each element takes, spelled out

X = (3, 4, 6)
ELEMENTWISE = {
    "add.Tensor": 1,
    "rsqrt.default": 2,  # 1 / sqrt(x)
    "sigmoid.default": 4,  # 1 / (1 + exp(-x))
    "silu.default": 4 + 1,  # x * sigmoid(x)
    "gelu.default": 5,  # (x / 2) * (1 + erf(x * c))
    "hardswish.default": 5,  # x * min(max(x + 3, 0), 6) / 6
    "leaky_relu.default": 3,  # x > 0 ? x : x * s
    "elu.default": 5,  # x > 0 ? x : a * (exp(x) - 1)
    "selu.default": 6,  # s * (x > 0 ? x : a * (exp(x) - 1))
    "celu.default": 6,  # x > 0 ? x : a * (exp(x / a) - 1)
    "softplus.default": 5,  # x > 20 ? x : log(1 + exp(x))
    "mish.default": 5,  # x * tanh(log(1 + exp(x)))
    "log_sigmoid.default": 4 + 1,  # log(sigmoid(x))
    "hardshrink.default": 3,  # abs(x) > s ? x : 0
    "logaddexp.default": 4,  # log(exp(x) + exp(y))
    "addcmul.default": 3,  # x + s * y * z
    "to.dtype": 0,
}
OPERANDS = {"add.Tensor": 2, "logaddexp.default": 2, "addcmul.default": 3}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_by_hand(name):
    extra = (torch.float64,) if name == "to.dtype" else ()
    assert last(graph_of(emit(name, *extra), *[X] * OPERANDS.get(name, 1))) == ELEMENTWISE[name] * prod(X)


LIGHT = {
    "broadcast": (emit("mul.Tensor"), [(3, 1, 6), (4, 1)], 3 * 4 * 6),
    "gelu by tanh": (emit("gelu.default", approximate="tanh"), [X], 9 * prod(X)),  # (x / 2) * (1 + tanh(c * (x + d * x * x * x)))
    "clamp": (emit("clamp.default", 0.0, 1.0), [X], 2 * prod(X)),
    "clamp from below": (emit("clamp.default", 0.0), [X], prod(X)),
    "clamp from above": (emit("clamp_max.default", 0.0), [X], prod(X)),
    # mean: sum; x - mean; its square, the mean of it: sum; divided by the root; weight; bias
    "layer norm": (lambda b, x, w, c: b.layer_norm(x, [6], w, c), [X, (6,), (6,)], 7 * prod(X)),
    "layer norm without weights": (emit("layer_norm.default", [6]), [X], 5 * prod(X)),
    "layer norm without bias": (lambda b, x, w: b.layer_norm(x, [6], w), [X, (6,)], 6 * prod(X)),
    # square, sum, divided by the root; weight
    "rms norm": (lambda b, x, w: b.rms_norm(x, [6], w), [X, (6,)], 4 * prod(X)),
    "rms norm without weight": (lambda b, x: b.rms_norm(x, [6]), [X], 3 * prod(X)),
    "group norm": (lambda b, x, w, c: b.group_norm(x, 2, w, c), [X, (4,), (4,)], 7 * prod(X)),
    # x - mean, divided by the root; weight; bias
    "batch norm": (lambda b, x, *w: b.batch_norm(x, *w, False, 0.1, 1e-5, False), [X, (4,), (4,), (4,), (4,)], 4 * prod(X)),
    "softmax": (emit("softmax.int", -1), [X], 5 * prod(X)),  # maximum, difference, exp, sum, quotient
    "mean": (emit("mean.dim", [1]), [X], prod(X)),
    "l2 norm": (emit("linalg_vector_norm.default"), [X], 2 * prod(X)),  # square, sum
    "max pool": (emit("max_pool2d.default", [2, 3]), [(2, 4, 6, 6)], 2 * 3 * (2 * 4 * 3 * 2)),
    "average pool, one number": (emit("avg_pool2d.default", [2]), [(2, 4, 6, 6)], 2 * 2 * (2 * 4 * 3 * 3)),
    "view": (emit("view.default", [12, 6]), [X], 0),
    "lookup": (emit("embedding.default"), [(31, 6), TensorType("i64", (2, 3))], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_light_op_by_hand(name):
    function, shapes, expected = LIGHT[name]
    graph = graph_of(function, *shapes)
    assert sum(op_of(node).flops(node) for node in graph.calls) == expected


# symbolic sizes (the tokens of local attention are always numbers).
# With numbers in place of the symbols, the formula gives what it gives for these numbers.

B, M, K_, N = sympy.symbols("batch rows contracted columns", integer=True, positive=True)
SYMBOLIC = {
    "linear": (emit("linear.default"), [(B, M, K_), (N, K_), (N,)], lambda b, m, k, n: 2 * b * m * k * n),
    "matmul": (emit("matmul.default"), [(B, M, K_), (B, K_, N)], lambda b, m, k, n: 2 * b * m * k * n),
    "einsum": (lambda b, x, y: b.einsum("bmk,bkn->bmn", [x, y]), [(B, M, K_), (B, K_, N)], lambda b, m, k, n: 2 * b * m * k * n),
    "convolution": (emit("conv1d.default", None, [2], [1]), [(B, 4, N), (6, 4, 3)], lambda b, m, k, n: 2 * b * 6 * ((n - 1) // 2 + 1) * 4 * 3),
    "transposed convolution": (emit("conv_transpose1d.default", None, [2]), [(B, 4, N), (4, 6, 3)], lambda b, m, k, n: 2 * b * 4 * n * 6 * 3),
    "attention": (lambda b, q, k: b.attention(q, k, k, scale=1.0), [(B, 4, M, 8), (B, 4, N, 8)],
                  lambda b, m, k, n: 2 * (b * 4) * m * n * (8 + 8)),
    "local attention": (lambda b, q: b.local_attention(q, q, q, scale=1.0, left=3, right=1, sinks=2, block=4), [(B, 4, 10, 8)],
                        lambda b, m, k, n: 2 * (b * 4) * (3 * 4) * (2 + 3 + 4 + 1) * (8 + 8)),
}  # fmt: skip


def with_numbers(graph: Graph, shapes, numbers) -> dict:
    """The symbols of the graph's inputs, which stand for those of the shapes, with their numbers."""
    pairs = zip(shapes, (value_type(node).shape for node in graph.inputs), strict=True)
    return {ours: numbers[theirs] for given, made in pairs for theirs, ours in zip(given, made, strict=True) if theirs in numbers}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_flops(name):
    function, shapes, by_hand = SYMBOLIC[name]
    graph = graph_of(function, *shapes)
    expression = last(graph)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.tuples(*[st.integers(2, 40)] * 4))
    def check(values):
        numbers = dict(zip((B, M, K_, N), values, strict=True))
        static = [tuple(numbers.get(size, size) for size in shape) for shape in shapes]
        found = int(sympy.sympify(expression).subs(with_numbers(graph, shapes, numbers)))
        assert found == last(graph_of(function, *static)) == by_hand(*values)

    check()
