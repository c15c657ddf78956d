"""Curves and rates from samples; calibration with fake runtimes on a fake clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paretorch.cost_model import calibrate as calibration_module
from paretorch.cost_model import fingerprint, panels
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.curves import Curve, Sample
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.price import Prices
from paretorch.cost_model.probes import panel
from paretorch.cost_model.rates import derive
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from tests.graphs import transformer

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


def test_a_disturbed_sample_takes_no_longer_than_one_that_does_more():
    large = [sample("matrix", (64.0, 64.0), 2 * 64**3, 1e-6), sample("elementwise", (4096.0,), 4096.0, 1e-6)]
    small = [sample("matrix", (32.0, 64.0), 64**3, 5e-6), sample("elementwise", (1024.0,), 1024.0, 9e-6)]
    other = sample("matrix", (8.0, 128.0), 2 * 8 * 128**2, 2e-6)  # fewer rows, but wider: nothing is known of it from the others
    rates = derive([*small, *large, other], {})["r", "f32"]
    matrix, passes = rates.curve(("matrix",)), rates.curve(("elementwise",))
    assert 64**3 / matrix((32.0, 64.0)) == pytest.approx(1e-6)
    assert 1024 / passes((1024.0,)) == pytest.approx(1e-6)
    assert 2 * 8 * 128**2 / matrix((8.0, 128.0)) == pytest.approx(2e-6)


def sample_of_block() -> Sample:
    """All that is measured at bf16 of a runtime that takes long to compile."""
    return Sample("r", "bf16", "block", (1.0,), 1.0, 1e-3, 0.1)


def test_convolutions_take_a_fixed_time_beside_their_flops():
    def seconds(positions: float, channels: float) -> float:
        return 55e-6 + 2 * positions * channels**2 / 2e11

    places = [(784.0, 32.0), (6272.0, 32.0), (784.0, 128.0), (3136.0, 96.0)]
    group = [sample("convolution.pointwise", at, 2 * at[0] * at[1] ** 2, seconds(*at)) for at in places]
    group += [sample("matrix", (64.0, 64.0), 2 * 64**3, 1e-6), sample("elementwise", (4096.0,), 4096.0, 1e-6)]
    rates, names = derive(group, {})["r", "f32"], ("convolution.pointwise", "convolution")
    curve = rates.curve(names)
    assert rates.fixed(names) == pytest.approx(55e-6, rel=0.1)
    assert rates.fixed(("matrix",)) == 0.0
    for at in (*places, (3136.0, 48.0), (2000.0, 64.0), (5000.0, 40.0)):
        assert 2 * at[0] * at[1] ** 2 / curve(at) + rates.fixed(names) == pytest.approx(seconds(*at), rel=0.1)
    halved = [replace(s, runtime="other", dtype="bf16", seconds=s.seconds / 2) for s in group]
    both = [*group, *(replace(s, runtime="other") for s in group), *halved, sample_of_block()]
    assert derive(both, {})["r", "bf16"].fixed_s == rates.fixed_s, "curves that follow from those at f32 keep what they were parted from"


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


def test_a_busy_machine_is_said():
    spread = [replace(sample("matrix", (64.0, 64.0 + place), 1.0, 1.0), spread=0.9 if place < 2 else 0.2) for place in range(10)]
    assert "the machine was busy while r was calibrated" in (calibration_module._disturbed(spread) or "")
    assert calibration_module._disturbed(spread[2:]) is None


def test_a_refused_dtype_and_a_failing_op_are_reported(clock):
    found = measured(clock, FakeRuntime(clock, refused="no half precision here", fails="softmax"))
    assert found.facts["fake bf16"] == "no half precision here"
    assert found.facts["fake f32 softmax"] == "RuntimeError: no softmax here"
    assert ("fake", "bf16") not in found.rates
    assert "matrix" in found.rates["fake", "f32"].curves


def test_what_runs_once_it_is_widened_is_no_failure(clock):
    class Narrow(FakeRuntime):
        def compile(self, graph: Graph, example_inputs):
            if example_inputs[0].dtype is torch.bfloat16:
                raise RuntimeError("no bf16 inputs here")
            return super().compile(graph, example_inputs)

    found = measured(clock, Narrow(clock))
    assert ("fake", "bf16") in found.rates
    assert not [reason for reason in found.facts.values() if "no bf16 inputs" in reason]


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
