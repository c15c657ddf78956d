"""Prices: formulas by hand, fake devices, memory, curves; calibration with fake runtimes on a fake clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from paretorch.cost_model import calibrate as calibration_module
from paretorch.cost_model import fingerprint, panels
from paretorch.cost_model.calibrate import analytic, calibrate
from paretorch.cost_model.curves import Curve, Rates, Sample
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.memory import copies, peak_memory, weight_bytes
from paretorch.cost_model.price import Prices, fusions
from paretorch.cost_model.probes import panel
from paretorch.cost_model.rates import derive
from paretorch.cost_model.work import work_of
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.types import TensorType

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
        (1, 1, ("convolution", "convolution.pointwise", "convolution"), (2 * 6 * 6, 8.0)),
        (8, 3, ("convolution", "convolution.depthwise", "convolution"), (2 * 6 * 6, 8.0)),
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


def block(b: Builder, x: Node, place: int, width: int, heads: int) -> Node:
    """A pre-norm transformer block on [B, T, C]; weights are its own."""

    def linear(y: Node, name: str, inner: int, outer: int) -> Node:
        return b.linear(y, b.constant(f"{name}{place}", torch.zeros(outer, inner)), b.constant(f"{name}_bias{place}", torch.zeros(outer)))

    def norm(y: Node) -> Node:
        return b.layer_norm(y, [width])

    split = [-1, x.meta["val"].shape[1], 3, heads, width // heads]
    qkv = b.unbind(b.permute(b.view(linear(norm(x), "qkv", width, 3 * width), split), [2, 0, 3, 1, 4]), 0)
    mixed = b.attention(b.item(qkv, 0), b.item(qkv, 1), b.item(qkv, 2), scale=1.0)
    joined = b.call(aten("reshape.default"), (b.permute(mixed, [0, 2, 1, 3]), [-1, x.meta["val"].shape[1], width]))
    x = b.add(x, linear(joined, "out", width, width))
    return b.add(x, linear(b.gelu(linear(norm(x), "up", width, 4 * width)), "down", 4 * width, width))


def transformer(depth: int, batch: int = 2, tokens: int = 16, width: int = 32, heads: int = 4, dtype: str = "f32") -> Graph:
    def body(b: Builder, x: Node) -> Node:
        for place in range(depth):
            x = block(b, x, place, width, heads)
        return b.linear(b.mean(x, [1]), b.constant("head", torch.zeros(10, width)))

    return build("transformer", body, x=TensorType(dtype, (batch, tokens, width)))


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


def test_break_even():
    """Half of the rows at the price of a copy: six halves of N bytes become four, and a launch of a microsecond is added."""

    def thrice(b: Builder, x: Node) -> Node:
        return b.neg(b.neg(b.neg(x)))

    def halved(tokens: int) -> Graph:
        return build("g", lambda b, x: thrice(b, b.clone(b.slice(x, 0, 0, tokens // 2))), x=f32(tokens, 64))

    def whole(tokens: int) -> Graph:
        return build("g", thrice, x=f32(tokens, 64))

    assert prices().break_even(whole, halved, "eager", 2, 4096) == pytest.approx(1e-6 * 1e10 / (2 * 4 * 64), abs=2)
    assert prices().break_even(whole, whole, "eager", 2, 64) is None


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


# curves


def test_curves_interpolate_on_logarithms_and_stay_constant_outside():
    line = Curve.of([((1.0,), 1.0), ((100.0,), 100.0)])
    assert line((10.0,)) == pytest.approx(10.0)
    assert (line((0.5,)), line((1e6,))) == (pytest.approx(1.0), pytest.approx(100.0))
    plane = Curve.of([((1.0, 1.0), 1.0), ((100.0, 1.0), 10.0), ((1.0, 100.0), 100.0)])
    assert plane((100.0, 1.0)) == pytest.approx(10.0)
    assert plane((100.0, 100.0)) == pytest.approx(100.0)
    assert plane((1.0, 10.0)) == pytest.approx(10.0)
    assert Curve.constant(7.0)((3.0, 4.0)) == pytest.approx(7.0)


def sample(curve: str, at: tuple[float, ...], amount: float, seconds: float) -> Sample:
    return Sample("r", "f32", curve, at, amount, seconds, 0.1)


def test_rates_from_samples():
    samples = [
        sample("matrix", (64.0, 64.0), 2 * 64**3, 1e-6), sample("elementwise", (4096.0,), 4096.0, 1e-6),
        sample("chain", (1.0,), 14 * 4096.0, 2e-6 + 0.25 * 12e-6), sample("permute", (4096.0,), 4096.0, 1e-9), sample("clone", (4096.0,), 4096.0, 1e-6),
    ]  # fmt: skip
    rates = derive(samples, {"inductor": "r"})
    assert rates["r", "f32"].curve(("matrix",))((64.0, 64.0)) == pytest.approx(2 * 64**3 / 1e-6)
    assert rates["r", "f32"].chained == pytest.approx(0.25)
    assert rates["r", "f32"].strided
    assert rates["inductor", "f32"].chained < rates["r", "f32"].chained
    executed = derive([s if s.curve != "permute" else replace(s, seconds=1e-6) for s in samples], {})["r", "f32"]
    assert not executed.strided
    assert "clone" not in executed.curves


# calibration, on a clock that only fake runtimes turn


class FakeRuntime:
    """Takes 1 microsecond a node and 1 nanosecond a flop or byte, by our own formulas."""

    def __init__(self, clock: list[float], name: str = "fake", refused: str = "", fails: str = "") -> None:
        self.clock, self.name, self.refused, self.fails = clock, name, refused, fails
        self.compiled = 0

    def refuses(self, graph: Graph | None = None) -> str | None:
        halves = graph is not None and any("bfloat16" in str(node.meta.get("val")) for node in graph.nodes)
        return self.refused if halves and self.refused else None

    def compile(self, graph: Graph, example_inputs):
        self.compiled += 1
        if self.fails and any(self.fails in str(node.target) for node in graph.calls):
            raise RuntimeError(f"no {self.fails} here")
        launches = len(graph.calls) * 1e-6

        def execute(*inputs: Tensor):
            self.clock[0] += launches + 1e-9 * sum(x.numel() for x in inputs)
            return inputs

        return execute


@pytest.fixture
def clock(monkeypatch, tmp_path):
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration_module, "QUICK_ROUNDS", 1)
    names = ("linear32x4", "linear128x1", "add", "add_out", "softmax", "permute")
    monkeypatch.setattr(panels, "PROBES", tuple(probe for probe in panels.PROBES if probe.name in names))
    monkeypatch.setattr(panels, "LARGEST_COLD_BYTES", 0.0)
    return [0.0]


def measured(clock, *runtimes, **options):
    return calibrate({runtime.name: runtime for runtime in runtimes}, clock=lambda: clock[0], **options)


def test_calibration_finds_what_the_runtime_does(clock, tmp_path):
    found = measured(clock, FakeRuntime(clock))
    rates = found.rates["fake", "f32"]
    assert rates.launch_s == pytest.approx(1e-6, rel=0.05)
    add = next(s for s in found.of("fake", "f32") if s.curve == "elementwise" and s.at == (2 * 4 * 1576 * 384,))
    assert add.seconds == pytest.approx(1576 * 384 * 1e-9, rel=0.05)
    assert ("fake", "bf16") in found.rates
    assert len(list(tmp_path.glob("calibration-fake-*.json"))) == 1
    assert "fake f32" in str(found)
    cost = Prices(found, DEVICES["cpu-avx2"]).graph_cost(transformer(1), "fake")
    assert cost.seconds > 0


def test_calibration_is_read_from_the_cache(clock):
    measured(clock, FakeRuntime(clock))
    again = FakeRuntime(clock)
    first = measured(clock, again)
    assert again.compiled == 0
    assert first.samples == measured(clock, again).samples
    measured(clock, again, cache=False)
    assert again.compiled > 0


@pytest.mark.parametrize("part", ["format", "processor", "features", "threads", "torch", "package"])
def test_a_change_of_any_part_of_the_machine_makes_the_cache_void(clock, part, monkeypatch):
    measured(clock, FakeRuntime(clock))
    original = fingerprint.fingerprint
    monkeypatch.setattr(fingerprint, "fingerprint", lambda *arguments: {**original(*arguments), part: "another"})
    again = FakeRuntime(clock)
    measured(clock, again)
    assert again.compiled > 0


def test_a_damaged_cache_is_measured_again(clock, tmp_path):
    measured(clock, FakeRuntime(clock))
    (path,) = tmp_path.glob("*.json")
    sound = json.loads(path.read_text())
    sound["samples"][0]["seconds"] = -1.0
    for damaged in ("", "{", "[]", json.dumps({"fingerprint": sound["fingerprint"], "samples": [{"a": 1}]}), json.dumps(sound)):
        path.write_text(damaged)
        again = FakeRuntime(clock)
        measured(clock, again)
        assert again.compiled > 0


def test_a_cache_that_cannot_be_written_is_said(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path / "file" / "below"))
    assert "not kept for later calls" in measured(clock, FakeRuntime(clock)).facts["cache"]


def test_a_refused_dtype_and_a_failing_op_are_reported(clock):
    found = measured(clock, FakeRuntime(clock, refused="no half precision here", fails="softmax"))
    assert found.facts["fake bf16"] == "no half precision here"
    assert found.facts["fake f32 softmax"] == "RuntimeError: no softmax here"
    assert ("fake", "bf16") not in found.rates
    assert "matrix" in found.rates["fake", "f32"].curves


def test_a_runtime_that_cannot_be_measured_takes_the_rates_of_another(clock):
    found = measured(clock, FakeRuntime(clock), FakeRuntime(clock, name="broken", fails="aten"))
    assert found.rates["broken", "f32"] == found.rates["fake", "f32"]
    assert found.facts["broken not measured"] == "the rates of fake are used"
    with pytest.raises(TargetError, match="none of the runtimes broken could run a single probe here"):
        measured(clock, FakeRuntime(clock, name="broken", fails="aten"), cache=False)


def test_a_device_row_that_is_contradicted_is_refused(clock, monkeypatch):
    found = measured(clock, FakeRuntime(clock))
    with pytest.raises(TargetError, match=r"the device row h100-sxm says 3350 GB/s of memory bandwidth; \d+ GB/s were measured"):
        calibration_module._refuse_contradiction(found, DEVICES["h100-sxm"], "cuda")
    calibration_module._refuse_contradiction(found, DEVICES["cpu-avx2"], "cpu")
    honest = replace(DEVICES["h100-sxm"], bandwidth_bytes_per_s=found.bandwidth_bytes_per_s)
    calibration_module._refuse_contradiction(found, honest, "cuda")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_probes_are_graphs_that_run(dtype):
    from paretorch.cost_model.probes import PROBES

    probes = tuple(probe for probe in PROBES if probe.quick and (dtype == "f32" or probe.half))
    graph = panel(probes, dtype, False)
    rows = [1 + place % 3 for place in range(len(probes))]
    found = graph.run(*(probe.input(n, dtype, "cpu") for probe, n in zip(probes, rows, strict=True)))
    assert len(found) == len(probes)
    assert all(torch.isfinite(x.float()).all() for x in found)
