"""Prices: formulas by hand, fake devices, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Node

from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.curves import Curve, Rates
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.memory import copies, peak_memory, weight_bytes
from paretorch.cost_model.price import Prices, fusions
from paretorch.cost_model.work import work_of
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.types import TensorType
from tests.graphs import transformer

BANDWIDTH, COMPUTE = DEVICES["fake-bandwidth"], DEVICES["fake-compute"]
RUNTIMES = ("eager", "inductor", "onnxruntime", "openvino")


def f32(*shape) -> TensorType:
    return TensorType("f32", shape)


def weight(b: Builder, *shape: int) -> Node:
    return b.constant("w", torch.zeros(shape))


def prices(device=BANDWIDTH) -> Prices:
    return Prices(analytic(device), device)


def only(graph: Graph) -> Node:
    return graph.calls[-1]


# work by hand


def test_linear_by_hand():
    work = work_of(only(build("g", lambda b, x: b.linear(x, weight(b, 7, 5), weight(b, 7)), x=f32(2, 3, 5))))
    assert work.flops == 2 * (2 * 3) * 5 * 7
    assert work.bytes_moved == 4 * (2 * 3 * 5 + 7 * 5 + 7 + 2 * 3 * 7)
    assert work.constant_bytes == 4 * (7 * 5 + 7)
    assert work.at == (6.0, pytest.approx((5 * 7) ** 0.5))
    assert work.is_rated_by_flops


def test_batched_product_by_hand():
    work = work_of(only(build("g", lambda b, x, y: b.matmul(x, y), x=f32(2, 4, 3, 5), y=f32(2, 4, 5, 7))))
    assert work.flops == 2 * 8 * 3 * 5 * 7
    assert work.at == (3.0, pytest.approx((5 * 7) ** 0.5))


def test_attention_by_hand():
    work = work_of(only(build("g", lambda b, q, k: b.attention(q, k, k, scale=1.0), q=f32(2, 4, 3, 8), k=f32(2, 4, 5, 8))))
    assert work.flops == 2 * 2 * 4 * 3 * 5 * (8 + 8)
    assert work.at == (8.0, 5.0)
    assert work.curves == ("attention", "attention")
    causal = work_of(only(build("g", lambda b, q: b.attention(q, q, q, scale=1.0, right=0), q=f32(2, 4, 5, 8))))
    assert causal.curves == ("attention.causal", "attention", "attention")


@pytest.mark.parametrize(
    ("groups", "taps", "kinds", "place"),
    [
        (1, 3, ("convolution", "convolution"), (2 * 6 * 6, 8.0)),
        (1, 1, ("convolution.pointwise", "convolution", "convolution"), (2 * 6 * 6, 8.0)),
        (8, 3, ("convolution.depthwise", "convolution", "convolution"), (2 * 6 * 6, 8.0)),
        (2, 3, ("convolution", "convolution"), (2 * 6 * 6, 4.0)),
    ],
)
def test_convolution_by_hand(groups, taps, kinds, place):
    def body(b, x):
        return b.convolution(x, weight(b, 8, 8 // groups, taps, taps), None, [1, 1], [taps // 2, taps // 2], [1, 1], groups)

    work = work_of(only(build("g", body, x=f32(2, 8, 6, 6))))
    assert work.flops == 2 * (2 * 8 * 6 * 6) * (8 // groups) * taps * taps
    assert work.curves == kinds
    assert work.at == place


def test_light_ops_by_hand():
    assert work_of(only(build("g", lambda b, x: b.add(x, x), x=f32(4, 8)))).bytes_moved == 2 * 4 * 32
    norm = work_of(only(build("g", lambda b, x: b.layer_norm(x, [8], weight(b, 8), weight(b, 8)), x=f32(4, 8))))
    assert norm.bytes_moved == 4 * (32 + 8 + 8 + 32)
    assert norm.curves == ("layer_norm", "row")


def test_an_op_without_a_row_is_priced_by_its_bytes():
    graph = build("g", lambda b, x: b.call(aten("erfc.default"), (x,)), x=f32(4, 8))
    assert work_of(only(graph)).bytes_moved == 2 * 4 * 32
    assert prices().node_cost(only(graph), "eager").seconds == pytest.approx(256 / 1e10 + 1e-6)


def test_symbolic_sizes_take_the_example():
    rows = sympy.Symbol("n", integer=True, positive=True)
    symbolic = build("g", lambda b, x: b.gelu(b.linear(x, weight(b, 16, 16))), x=TensorType("f32", (rows, 16)))
    static = build("g", lambda b, x: b.gelu(b.linear(x, weight(b, 16, 16))), x=f32(8, 16))  # symbols of a builder have the hint 8
    for runtime in RUNTIMES:
        assert prices().graph_cost(symbolic, runtime) == prices().graph_cost(static, runtime)
    assert peak_memory(symbolic) == peak_memory(static)


# prices on the fake devices


def test_roofline_by_hand():
    node = only(build("g", lambda b, x: b.linear(x, weight(b, 64, 64)), x=f32(64, 64)))
    flops, moved = 2 * 64**3, 3 * 4 * 64 * 64
    bound_by_bytes = prices(BANDWIDTH).node_cost(node, "eager")
    assert bound_by_bytes.seconds == pytest.approx(moved / 1e10 + 1e-6)
    assert (bound_by_bytes.flops, bound_by_bytes.bytes_moved, bound_by_bytes.launches) == (flops, moved, 1.0)
    assert prices(COMPUTE).node_cost(node, "eager").seconds == pytest.approx(flops / 1e10 + 1e-6)


def test_views_are_free_where_there_are_strides():
    graph = build("g", lambda b, x: b.permute(x, [1, 0]), x=f32(256, 256))
    assert prices().node_cost(only(graph), "eager").seconds == 0.0
    assert prices().node_cost(only(graph), "onnxruntime").seconds == pytest.approx(2 * 4 * 256 * 256 / 1e10 + 1e-6)


def test_reshaping_what_was_permuted_is_a_copy():
    def body(b, x):
        return b.call(aten("reshape.default"), (b.permute(x, [1, 0]), [-1]))

    graph = build("g", body, x=f32(256, 128))
    assert copies(only(graph))
    assert prices().node_cost(only(graph), "eager").seconds == pytest.approx(2 * 4 * 256 * 128 / 1e10 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "order", "wanted", "is_copy"),
    [
        ((4, 6, 8), (0, 1, 2), (24, 8), False),
        ((4, 6, 8), (1, 0, 2), (6, 32), True),
        ((4, 6, 8), (1, 0, 2), (6, 4, 2, 4), False),
        ((4, 6, 8), (0, 2, 1), (4, 48), True),
        ((4, 1, 8), (1, 0, 2), (4, 8), False),
    ],
)
def test_which_reshapes_copy_agrees_with_torch(shape, order, wanted, is_copy):
    graph = build("g", lambda b, x: b.call(aten("reshape.default"), (b.permute(x, list(order)), list(wanted))), x=f32(*shape))
    source = torch.zeros(shape).permute(order)
    assert copies(only(graph)) == is_copy == (source.reshape(wanted).data_ptr() != source.data_ptr())


def pointwise_chain(b: Builder, x: Node) -> Node:
    return b.mul(b.gelu(b.linear(x, weight(b, 32, 32))), x)


def test_what_may_be_fused():
    linear, gelu, mul = build("g", pointwise_chain, x=f32(8, 32)).calls
    assert (fusions(linear), fusions(gelu), fusions(mul)) == ((), ("epilogue",), ("epilogue", "chained"))
    add, norm = build("g", lambda b, x: b.layer_norm(b.add(x, x), [32]), x=f32(8, 32)).calls
    assert (fusions(add), fusions(norm)) == (("into_row",), ())


def test_a_convolution_takes_what_follows_it():
    def body(b, x):
        y = b.convolution(x, weight(b, 8, 8, 1, 1), None, [1, 1], [0, 0], [1, 1], 1)
        y = b.batch_norm(y, weight(b, 8), weight(b, 8), weight(b, 8), weight(b, 8), False, 0.1, 1e-5, False)
        return b.relu(b.add(y, x))

    graph = build("g", body, x=f32(2, 8, 4, 4))
    assert [fusions(node) for node in graph.calls] == [(), ("filtered",), ("filtered",), ("filtered",)]


def test_fused_ops_cost_no_pass_of_their_own():
    chain = build("g", lambda b, x: b.mul(b.add(x, x), x), x=f32(512, 512))
    alone = build("g", lambda b, x: b.add(x, x), x=f32(512, 512))
    assert prices().graph_cost(chain, "inductor") == prices().graph_cost(alone, "inductor") + replace(
        prices().graph_cost(alone, "inductor"), seconds=0.0, flops=512.0 * 512, bytes_moved=0.0, launches=0.0
    )
    assert prices().graph_cost(chain, "eager").seconds > 2 * prices().graph_cost(alone, "eager").seconds


def test_moves_beside_attention_are_seen():
    def body(b, x):
        q = b.permute(b.view(x, [2, 16, 4, 8]), [0, 2, 1, 3])
        return b.permute(b.attention(q, q, q, scale=1.0), [0, 2, 1, 3])

    graph = build("g", body, x=f32(2, 16, 32))
    assert [fusions(node) for node in graph.calls] == [("beside_attention",), ("beside_attention",), (), ("beside_attention",)]


def test_cold_weights_are_read_from_memory():
    rates = Rates({"matrix": Curve.constant(1e12), "elementwise": Curve.constant(1e15)}, 0.0, cold_s_per_byte=1e-9)
    found = replace(analytic(BANDWIDTH), rates={("eager", "f32"): rates}, cache_bytes=4 * 64 * 64 * 2.0)

    def layers(count: int) -> Graph:
        def body(b, x):
            for place in range(count):
                x = b.linear(x, b.constant(f"w{place}", torch.zeros(64, 64)))
            return x

        return build("g", body, x=f32(1, 64))

    one, four = (Prices(found, BANDWIDTH).graph_cost(layers(count), "eager").seconds for count in (1, 4))
    assert one == pytest.approx(2 * 64 * 64 / 1e12)
    assert four == pytest.approx(4 * (2 * 64 * 64 / 1e12 + 4 * 64 * 64 * 1e-9))


def test_a_dtype_without_rates_runs_as_f32_and_a_runtime_without_is_named():
    graph = build("g", lambda b, x: b.gelu(x), x=TensorType("f64", (4, 4)))
    assert prices().graph_cost(graph, "eager").seconds > 0
    with pytest.raises(
        TargetError, match=r"no prices for the runtime 'tvm' on fake-bandwidth; calibrated: eager, inductor, onnxruntime, openvino"
    ):
        prices().graph_cost(graph, "tvm")


@pytest.mark.parametrize("device", [BANDWIDTH, COMPUTE], ids=lambda device: device.name)
def test_golden_prices(device, golden):
    graph, found = transformer(2), prices(device)
    lines = [f"{device.name}: microseconds, flops, bytes, launches"]
    for runtime in RUNTIMES:
        total = found.graph_cost(graph, runtime)
        lines.append(f"{runtime}: {total.seconds * 1e6:.4f} {total.flops:.0f} {total.bytes_moved:.0f} {total.launches:.2f}")
        for node in graph.calls:
            cost = found.node_cost(node, runtime)
            if cost.seconds:
                lines.append(f"  {node.name}: {cost.seconds * 1e6:.4f} {cost.flops:.0f} {cost.bytes_moved:.0f} {cost.launches:.2f}")
    lines.append(f"peak memory: {found.peak_memory(graph)} bytes")
    golden("\n".join(lines) + "\n")


def test_two_devices_order_the_same_choice_differently():
    """Many bytes and few flops against few bytes and many flops."""
    wide = build("g", lambda b, x: b.add(x, x), x=f32(1024, 1024))
    deep = build("g", lambda b, x: b.linear(x, weight(b, 256, 256)), x=f32(1024, 256))
    first, second = (tuple(prices(device).graph_cost(graph, "eager").seconds for graph in (wide, deep)) for device in (BANDWIDTH, COMPUTE))
    assert first[0] > first[1]
    assert second[0] < second[1]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RUNTIMES), st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.sampled_from(["batch", "tokens", "width"]))
def test_prices_never_fall_when_a_shape_grows(runtime, batch, tokens, narrow, grown):
    sizes = {"batch": batch, "tokens": tokens, "width": 4 * narrow}
    larger = {**sizes, grown: 2 * sizes[grown]}
    for device in (BANDWIDTH, COMPUTE):
        small, large = (prices(device).graph_cost(transformer(1, heads=2, **s), runtime) for s in (sizes, larger))
        assert large.seconds >= small.seconds
        assert large.flops > small.flops
        assert large.bytes_moved >= small.bytes_moved


def test_equal_layers_are_priced_once(monkeypatch):
    found, counted = prices(), []
    original = Prices._price
    monkeypatch.setattr(Prices, "_price", lambda self, *arguments: counted.append(1) or original(self, *arguments))
    found.graph_cost(transformer(2), "eager")
    two = len(counted)
    found.graph_cost(transformer(6), "eager")
    assert len(counted) == two


# memory


def test_memory_by_hand():
    def body(b, x):
        y = b.relu(x)  # x and y
        z = b.permute(y, [1, 0])  # y's memory
        return b.add(b.relu(z), 1.0)  # x, y and a third; then x, the third and the sum

    assert peak_memory(build("g", body, x=f32(64, 64))) == 3 * 4 * 64 * 64


def test_memory_counts_weights_once_and_residuals_while_they_live():
    def body(b, x):
        shared = weight(b, 64, 64)
        y = b.linear(b.linear(x, shared), shared)
        return b.add(y, x)

    graph = build("g", body, x=f32(8, 64))
    assert weight_bytes(graph) == 4 * 64 * 64
    assert peak_memory(graph) == 4 * 64 * 64 + 3 * 4 * 8 * 64


def test_memory_of_a_copying_reshape():
    def body(b, x):
        return b.call(aten("reshape.default"), (b.permute(x, [1, 0]), [-1]))

    assert peak_memory(build("g", body, x=f32(32, 16))) == 2 * 4 * 32 * 16


def test_memory_of_several_outputs():
    graph = build("g", lambda b, x: b.item(b.unbind(x, 0), 1), x=f32(3, 100))
    assert peak_memory(graph) == 4 * 300
