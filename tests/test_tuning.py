"""Schedules: candidates, the static model, the race, and what is kept; without a GPU, so most tests stand in for the compiler and the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paretorch import tuning
from paretorch.codegen.kernel import ARCHITECTURES, Binary, Kernel, Region, compile_each
from paretorch.codegen.occupancy import UNITS, occupancy, schedule_refusal
from paretorch.codegen.region_inputs import region_inputs, size_class
from paretorch.codegen.regions import region_of, schedules_of
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.codegen.schedule_cache import ScheduleCache
from paretorch.codegen.triton_runtime import TritonRuntime, each_alone, kernels_of
from paretorch.codegen.triton_text import render
from paretorch.codegen.tuning import Tuner
from paretorch.cost_model.devices import Target
from paretorch.cost_model.measure import device_timing, race
from paretorch.generated import Generated
from paretorch.ir.errors import LoweringError, TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Measurement
from tests.kernel_cases import FAMILIES, SHARED_BYTES, assert_close, graph_of, inputs_of, read_by, region

pytest.importorskip("triton")

GRAPH = FAMILIES["layer_norm"].graph("bf16", 3, 2048)  # of three schedules: 4, 2 and 8 warps
OTHER = FAMILIES["packed_gate"].graph("f32", 4, 48)


def options(kernel: Kernel) -> int:
    return kernel.schedule["num_warps"]


class Compiler:
    """Says what it is told of each number of warps; 32 registers otherwise."""

    def __init__(self, **by_warps: Binary | str) -> None:
        self.by_warps = {int(name[1:]): found for name, found in by_warps.items()}
        self.asked: list[list[Kernel]] = []

    def __call__(self, kernels: Sequence[Kernel], archs: Sequence[str]) -> dict[tuple[str, str], Binary | str]:
        self.asked.append(list(kernels))
        assert len({kernel.name for kernel in kernels}) == len(kernels)
        return {(k.name, a): self.by_warps.get(options(k), Binary(a, 32, 0, 0, b"")) for k in kernels for a in archs}


def clock(**by_warps: float) -> Callable[[dict[str, Any], int], dict[str, Measurement]]:
    """Runs each launch once; seconds by number of warps, else 9."""

    def measure(calls: dict[str, Any], rounds: int) -> dict[str, Measurement]:
        found = {}
        for name, call in calls.items():
            call()
            text = call.func.__globals__["SCHEDULE"]["num_warps"]
            found[name] = Measurement(name, by_warps.get(f"w{text}", 9.0), 0.0, rounds)
        return found

    return measure


def tuner(folder: Path | None = None, compiler: Any = None, measure: Any = None) -> Tuner:
    notes: list[str] = []
    return Tuner("sm_90", ScheduleCache("a device", "sm_90", folder, notes), measure, "cpu", compiler or Compiler(), notes=notes)


def spilled(count: int = 8) -> Binary:
    return Binary("sm_90", 255, count, 0, b"")


def warps(found: Sequence[Any]) -> list[int]:
    return [schedule["num_warps"] for schedule in found]


# candidates


def attention(dtype: str, tokens: int) -> Graph:
    return graph_of(lambda b, q, k, v: b.attention(q, k, v, scale=0.1), **dict.fromkeys("qkv", f"{dtype}[1,1,{tokens},16]"))


def matching(dtype: str) -> Region:
    def match(b: Any, metric: Any) -> Any:
        found = b.match_tokens(metric, None, 3, 1)
        return tuple(b.item(found, place) for place in range(3))

    return region_of(graph_of(match, metric=f"{dtype}[2,19,32]").calls[:1])


CASES: dict[str, Callable[[], Region]] = {
    "row": lambda: region(GRAPH),
    "long row": lambda: region(FAMILIES["layer_norm"].graph("f32", 1, 16411)),
    "elementwise": lambda: region(OTHER),
    "attention": lambda: region(attention("f16", 100)),
    "attention of f32": lambda: region(attention("f32", 40)),
    "split attention": lambda: region(
        graph_of(lambda b, q, k, v: b.attention(q, k, v, scale=0.1), q="f16[1,2,1,16]", k="f16[1,1,512,16]", v="f16[1,1,512,16]")
    ),
    "matching": lambda: matching("f32"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_candidate_computes_the_same(name: str) -> None:
    one = CASES[name]()
    offered = schedules_of(one)
    assert 1 < len(offered) <= 8
    assert len({str(schedule) for schedule in offered}) == len(offered)
    assert render(one).schedule == render(one, 0, offered[0]).schedule == offered[0], "the first is the template's default"
    torch.manual_seed(0)
    inputs = region_inputs(one, "cpu")
    expected: Any = None
    for schedule in offered:
        made = render(one, 0, schedule).launch(*inputs)
        found = made if isinstance(made, tuple) else (made,)
        expected = expected or found
        assert_close(found, expected, 1e-2 if "f16" in render(one).source or "bf16" in render(one).source else 1e-5)


# the static model


def test_units_of_every_architecture() -> None:
    assert set(UNITS) == set(ARCHITECTURES)
    assert {arch: UNITS[arch].block_bytes for arch in SHARED_BYTES} == SHARED_BYTES
    with pytest.raises(TargetError, match=r"no figures of the units of 'sm_1'"):
        occupancy(Binary("sm_1", 1, 0, 0, b""), 1)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "count", "share"),
    [  # by hand, as NVIDIA's occupancy calculator has it: 65536 registers in a unit, in four parts, eight of a thread at a time
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 64, 0, 8, 0.5),
        ("sm_90", 65, 0, 4, 0.4375),  # 72 registers: 7 warps in each part
        ("sm_90", 128, 0, 16, 0.25),
        ("sm_90", 129, 0, 16, 0.0),  # 12 warps only: no block of 16
        ("sm_90", 32, 0, 1, 0.5),  # 32 blocks at once
        ("sm_80", 32, 40 * 1024, 4, 0.25),  # four blocks of 41 of 164 KB
        ("sm_89", 32, 0, 8, 1.0),  # 48 warps
        ("sm_80", 32, 163 * 1024, 4, 0.0625),
        ("sm_80", 32, 164 * 1024, 4, 0.0),
        ("gfx942", 128, 0, 4, 0.5),  # four of eight waves in each part
        ("gfx942", 64, 0, 32, 0.0),  # 2048 threads in a block
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, count: int, share: float) -> None:
    assert occupancy(Binary(arch, registers, 0, shared, b""), count) == share


def test_what_is_not_timed() -> None:
    made = render(region(GRAPH))
    assert schedule_refusal(made, Binary("sm_90", 64, 0, 0, b"")) is None
    assert schedule_refusal(made, spilled(16)) == "BLOCK=2048, num_warps=4 spills 16 on sm_90"
    wide = "BLOCK=2048, num_warps=4 takes 300000 bytes of shared memory; a block has 232448 on sm_90"
    assert schedule_refusal(made, Binary("sm_90", 64, 0, 300000, b"")) == wide
    few = "BLOCK=2048, num_warps=4 keeps 19% of the warps of sm_90 in flight; a kernel that streams needs 25%"
    assert schedule_refusal(made, Binary("sm_90", 160, 0, 0, b"")) == few
    assert schedule_refusal(render(region(attention("f16", 100))), Binary("sm_90", 160, 0, 0, b"")) is None, (
        "products need no threads to wait"
    )
    many = render(region(GRAPH), 0, {"BLOCK": 2048, "num_warps": 16})
    assert schedule_refusal(many, Binary("sm_90", 200, 0, 0, b"")) == (
        "BLOCK=2048, num_warps=16 takes 200 registers in 16 warps, which no unit of sm_90 has"
    )


def test_candidates_are_compiled_together() -> None:
    """For real: one that does not compile takes nothing from the others."""
    one = region(OTHER)
    good, bad = render(one, 0), render(one, 1, {"BLOCK": 96, "num_warps": 4})  # a block is a power of two
    found = compile_each([good, bad], ["sm_90"])
    binary, reason = found[good.name, "sm_90"], found[bad.name, "sm_90"]
    assert isinstance(binary, Binary)
    assert schedule_refusal(good, binary) is None
    assert isinstance(reason, str)
    assert reason.startswith(f"{bad.name} does not compile for sm_90: ")


# where the device is not here


def test_the_first_that_the_device_holds() -> None:
    one = region(GRAPH)
    compiler = Compiler()
    assert tuner(compiler=compiler).schedules([one]) == [schedules_of(one)[0]]
    assert [len(asked) for asked in compiler.asked] == [1], "the others are not compiled for nothing"
    compiler = Compiler(w4=spilled(), w2="it does not compile")
    assert warps(tuner(compiler=compiler).schedules([one, region(OTHER)])) == [8, 8]
    assert [len(asked) for asked in compiler.asked] == [2, 2, 1]


def test_when_nothing_is_held() -> None:
    one = region(GRAPH)
    failing = tuner(compiler=Compiler(w4=spilled(), w2=spilled(), w8=spilled()))
    assert warps(failing.schedules([one])) == [4]
    assert failing.notes == [f"no schedule of {one} is held by sm_90, and its default is taken: BLOCK=2048, num_warps=4 spills 8 on sm_90"]


def test_without_a_compiler(tmp_path: Path) -> None:
    def absent(kernels: Any, archs: Any) -> Any:
        raise TargetError("the installed triton cannot compile for sm_90: it was built without that backend")

    one = tuner(tmp_path, absent)
    assert warps(one.schedules([region(GRAPH)])) == warps(one.schedules([region(GRAPH)])) == [4]
    assert len(one.notes) == 1
    assert one.notes[0].startswith("schedules are the templates' defaults: the installed triton")
    assert list(tmp_path.iterdir()) == [], "a default that was not looked at is not kept"


# where it is here


def test_the_fastest() -> None:
    compiler = Compiler()
    found = tuner(compiler=compiler, measure=clock(w4=3.0, w2=2.0, w8=1.0)).schedules([region(GRAPH)])
    assert warps(found) == [8]
    assert [len(asked) for asked in compiler.asked] == [3]


def test_noise_does_not_choose() -> None:
    assert warps(tuner(measure=clock(w4=1.01, w2=1.015, w8=1.0)).schedules([region(GRAPH)])) == [4]
    assert warps(tuner(measure=clock(w4=1.03, w2=1.015, w8=1.0)).schedules([region(GRAPH)])) == [2]


def test_seconds_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untimed call, the cache cleared, then the timed call between two events."""
    log: list[str] = []

    def event(enable_timing: bool) -> SimpleNamespace:
        return SimpleNamespace(record=lambda: log.append("event"), synchronize=lambda: log.append("wait"), elapsed_time=lambda end: 2.0)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch, "empty", lambda count, dtype, device: SimpleNamespace(zero_=lambda: log.append(f"clear on {device}")))
    found = race({"one": lambda: log.append("call")}, 1, timing=device_timing())
    assert log == ["call", "clear on cuda", "event", "call", "event", "wait"]
    assert found["one"].samples == (2e-3,)


def test_what_spills_is_not_timed() -> None:
    found = tuner(compiler=Compiler(w8=spilled()), measure=clock(w4=3.0, w2=2.0, w8=1.0)).schedules([region(GRAPH)])
    assert warps(found) == [2]


def test_a_launch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Kernel.launch

    def launch(kernel: Kernel) -> Callable[..., object]:
        if options(kernel) == 8:
            raise RuntimeError("out of resource: shared memory")
        return whole.fget(kernel)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(Kernel, "launch", property(launch))
    one = tuner(measure=clock(w4=3.0, w2=2.0, w8=1.0))
    assert warps(one.schedules([region(GRAPH)])) == [2]
    assert one.notes == [
        "BLOCK=2048, num_warps=8 of kernel_02_add_layer_norm_gelu was left out: RuntimeError: out of resource: shared memory"
    ]


def test_no_room_for_the_inputs(tmp_path: Path) -> None:
    one = tuner(tmp_path, measure=clock())

    def full(region: Region, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 300 GiB")

    one.inputs = full
    assert warps(one.schedules([region(GRAPH)])) == [4]
    assert one.notes[0].endswith("was not timed: OutOfMemoryError: CUDA out of memory. Tried to allocate 300 GiB")
    assert list(tmp_path.iterdir()) == []


def test_a_race_in_the_interpreter() -> None:
    """The repository's own race, on launches that really run."""
    one = tuner(measure=lambda calls, rounds: race(calls, 3, seed=0))
    assert one.schedules([region(OTHER)])[0] in schedules_of(region(OTHER))
    assert one.notes == []


def test_inputs_are_of_the_real_sizes() -> None:
    graph = graph_of(
        lambda b, x, y, m, i: b.add(b.where(m, b.permute(x, [1, 0]), y), i), x="bf16[n,6]", y="f32[6,n]", m="bool[6,1]", i="i64[]"
    )  # fmt: skip
    one = region_of([node for node in graph.calls if str(node.target) != "aten.permute.default"])
    made = region_inputs(one, "cpu")
    for x, node in zip(made, one.reads, strict=True):
        fake = node.meta["val"]
        assert x.dtype == fake.dtype
        assert [size for size, wanted in zip(x.shape, fake.shape, strict=True) if isinstance(wanted, int) and size != wanted] == []
    assert {x.shape[axis] for x, node in zip(made, one.reads, strict=True) for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt)} == {8}  # fmt: skip
    assert size_class(one).endswith("<= 8")
    assert size_class(region(GRAPH)) == ""
    assert region_inputs(region(FAMILIES["chain"].graph("f32", 0, 7)), "cpu")[0].shape == (0, 3, 7)


# where it is used


def test_runtime_and_kernels_have_the_chosen_schedule() -> None:
    one = tuner(measure=clock(w4=3.0, w2=2.0, w8=1.0))
    priced = [(region(GRAPH), None)]
    kernels, serving = kernels_of([*priced, *priced], one)
    assert (warps([kernel.schedule for kernel in kernels]), serving, kernels[0].uses) == ([8], [0, 0], 2)
    assert "schedule BLOCK=2048, num_warps=8;" in kernels[0].source
    assert Generated.of(priced, one).kernels[0].schedule == kernels[0].schedule
    inputs = inputs_of(GRAPH)
    execute = TritonRuntime(each_alone, one).compile(GRAPH, inputs)
    assert_close(execute(*inputs), GRAPH.run(*inputs), 4e-2)
    assert kernels[0].launch(*read_by(GRAPH, inputs))


def test_regions_that_no_template_takes() -> None:
    graph = graph_of(lambda b, x: b.layer_norm(x, [2, 3]), x="f32[4,2,3]")
    with pytest.raises(LoweringError, match="normalises the last 2 axes"):
        tuner().schedules([region_of(graph.calls)])


def test_tuner_of_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path))
    notes: list[str] = []
    assert tuning.tuner_for(Target.parse("cpu"), notes) is None
    found = tuning.tuner_for(Target.parse("cuda:h100"), notes)
    assert found is not None
    assert (found.arch, found.measure, found.cache.marks["device"]) == ("sm_90", None, "h100-sxm")
    assert found.cache.path is not None
    assert found.cache.path.parent == tmp_path
    if not torch.cuda.is_available():
        assert tuning.tuner_here() is None


@pytest.mark.parametrize("is_here", [True, False])
def test_session_on_a_gpu(is_here: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a session gets where the GPU is here: a tuner that times, and replayed calls."""
    monkeypatch.setenv("PARETORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    target = SimpleNamespace(device=Target.parse("cuda:h100").device, is_here=is_here)
    session: Any = SimpleNamespace(target=target, notes=[], tuner=None, fusion=None, lowering=SimpleNamespace(), runtimes=())
    usable: dict[str, Any] = dict.fromkeys(("eager", "triton")) | {name: RUNTIMES[name] for name in ("eager", "triton")}
    tuning.equip(session, usable)
    assert session.tuner.measure == (tuning.race_kernels if is_here else None)
    assert [type(runtime).__name__ for runtime in usable.values()] == (["Graphed"] * 2 if is_here else ["Eager", "TritonRuntime"])
    inner = usable["triton"].runtime if is_here else usable["triton"]
    assert inner.tuner is session.tuner
    assert tuning.race_calls({"one": lambda: None}, 3)["one"].rounds == 3
