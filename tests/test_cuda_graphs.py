"""Calls that are replayed, without a GPU: a stand-in for CUDA records them, and leaves its results in the same memory at each replay."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from paretorch.codegen.cuda_graphs import (
    MOST_FORMS,
    MOST_REASONS,
    WARM_UPS,
    CudaRecorder,
    Recording,
    Replayed,
    _first_line,
)
from paretorch.ir.errors import LoweringError
from paretorch.ir.protocols import Measurement


class Fake:
    """Replays by calling again, into the outputs that were there when it recorded, as a CUDA graph does."""

    def __init__(self, refusal: str | None = None, failure: Exception | None = None) -> None:
        self.refusal, self.failure, self.busy = refusal, failure, False
        self.records: list[Any] = []  # the pools that were given
        self.replays = self.waits = 0

    def refuses(self, inputs: Any) -> str | None:
        return self.refusal

    def is_busy(self) -> bool:
        return self.busy

    def wait(self, buffers: Any) -> None:
        self.waits += 1

    def record(self, call: Callable[[], tuple[Any, ...]], device: torch.device, pool: Any) -> Recording:
        self.records.append(pool)
        if self.failure is not None:
            raise self.failure
        outputs = call()

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(outputs, call(), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)

        return Recording(replay, outputs, pool or f"pool {len(self.records)}")


def double(*inputs: Tensor) -> tuple[Any, ...]:
    return (*(x * 2 for x in inputs), 7)


def test_the_same_form_is_replayed() -> None:
    fake = Fake()
    call = Replayed(double, recorder=fake)
    for _ in range(3):
        x = torch.randn(3, 4)
        found, number = call(x)
        assert torch.equal(found, x * 2)
        assert number == 7
    assert (len(fake.records), fake.replays, fake.waits, call.forms, call.reasons) == (1, 3, 3, 1, [])


def test_no_result_is_overwritten_or_shared() -> None:
    """Results of earlier calls stay, the caller may write into them, and what is returned as it came is no input of the caller's."""
    call = Replayed(lambda x: (x, x.t(), x + 1), recorder=Fake())
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    earlier, later = call(first), call(second)
    places = [x.untyped_storage().data_ptr() for x in (first, second, *earlier, *later)]
    assert len(set(places)) == len(places)
    earlier[0].fill_(9.0)
    assert torch.equal(later[0], second)
    assert torch.equal(call(first)[0], torch.zeros(2, 3))
    assert torch.equal(later[1], second.t())


def test_fixed_sizes_are_recorded_once() -> None:
    fake = Fake()
    call = Replayed(double, recorder=fake)
    call(torch.ones(3, 4))
    for other in (torch.ones(4, 3), torch.ones(3, 4).double(), torch.ones(4, 3).t()):
        assert torch.equal(call(other)[0], other * 2)
    assert (len(fake.records), fake.replays) == (1, 1)
    assert call.reasons[0] == "called with float32[4, 3] with strides [3, 1], which is not what was recorded"
    assert len(call.reasons) == 3


def test_varying_sizes_are_recorded_when_they_come_again() -> None:
    fake = Fake()
    call = Replayed(double, varies=True, recorder=fake)
    for rows in (2, 3, 2, 3, 2, 3, 5):
        x = torch.randn(rows, 4)
        assert torch.equal(call(x)[0], x * 2)
    assert (call.forms, fake.replays, call.reasons) == (2, 4, [])
    assert fake.records == [None, "pool 1"], "recordings of one executable share their memory"


def test_the_forms_that_were_not_used_for_longest_are_dropped() -> None:
    fake = Fake()
    call = Replayed(double, varies=True, recorder=fake)
    for rows in range(1, MOST_FORMS + 1):
        call(torch.ones(rows))
        call(torch.ones(rows))
    call(torch.ones(1))
    for _ in range(2):
        call(torch.ones(MOST_FORMS + 1))
    assert (call.forms, len(fake.records)) == (MOST_FORMS, MOST_FORMS + 1)
    call(torch.ones(1))
    assert len(fake.records) == MOST_FORMS + 1, "it was used again, and stayed"
    for _ in range(2):
        call(torch.ones(2))
    assert len(fake.records) == MOST_FORMS + 2, "it was dropped, and is recorded anew"
    for rows in range(10, 1000):
        call(torch.ones(rows))
    assert len(call._seen) <= 4 * MOST_FORMS


def test_a_capture_that_fails_leaves_the_plain_call() -> None:
    fake, notes = Fake(failure=RuntimeError("operation not permitted when stream is capturing\nmore")), []
    call = Replayed(double, recorder=fake, note=notes.append)
    for _ in range(3):
        assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 2.0))
    assert len(fake.records) == 1, "it is not tried again"
    assert call.reasons == notes == ["its launches cannot be recorded: operation not permitted when stream is capturing"]


def test_the_call_s_own_error_is_seen() -> None:
    def broken(x: Tensor) -> tuple[Any, ...]:
        if len(x) != 2:
            raise LoweringError("two rows are needed")
        return (x + 1,)

    call = Replayed(broken, recorder=Fake())
    with pytest.raises(LoweringError, match="two rows"):
        call(torch.ones(3))
    call(torch.ones(2))
    assert call.forms == 1, "a wrong first call does not keep the right ones from being recorded"


def test_what_cuda_cannot_record() -> None:
    call = Replayed(double, recorder=CudaRecorder())
    assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 2.0))
    assert call.reasons == ["its inputs are on cpu; a recording takes one CUDA device"]
    assert CudaRecorder().refuses([]) == "it has no inputs"
    assert (
        CudaRecorder().refuses([torch.ones(2, device="meta"), torch.ones(())])
        == "its inputs are on meta, cpu; a recording takes one CUDA device"
    )


class Stream:
    """Of CUDA, for one device: what waits for what, in order."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda with everything that a capture uses replaced; calls of torch's own functions must fit their signatures."""
    log: list[Any] = []
    state = SimpleNamespace(log=log, current=Stream(log, "main"), fails=None)
    signature = inspect.signature(torch.cuda.graph.__init__)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, state.current = state.current, stream
        try:
            yield
        finally:
            state.current = before

    class Capture:
        def __init__(self, *given: Any, **options: Any) -> None:
            assert signature.bind(self, *given, **options).arguments["capture_error_mode"] == "thread_local"
            log.append(("capture on", state.current.name, options["pool"]))

        def __enter__(self) -> None:
            assert not gc.isenabled()

        def __exit__(self, *error: object) -> None:
            if state.fails is not None:
                raise state.fails  # as CUDA does, where a capture was broken off
            log.append("captured")

    streams = (Stream(log, name) for name in ("warm", "side", "warm 2", "side 2", "warm 3", "side 3"))
    names: dict[str, Any] = {
        "Stream": lambda device: next(streams), "stream": on, "current_stream": lambda device=None: state.current,
        "device": lambda device: nullcontext(), "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replayed")),
        "graph": Capture, "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
    }  # fmt: skip
    for name, value in names.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch.cuda.memory, name)
        monkeypatch.setattr(torch.cuda.memory, name, lambda *given, name=name: log.append((name, *given)))
    return state


def test_a_capture(cuda: SimpleNamespace) -> None:
    recorder, device = CudaRecorder(), torch.device("cuda", 0)
    found = recorder.record(lambda: (cuda.log.append(f"launch on {cuda.current.name}"), 3), device, None)
    assert cuda.log == [
        ("warm", "waits for", "main"), *["launch on warm"] * WARM_UPS, ("main", "waits for", "warm"),
        ("capture on", "side", (0, 1)), "launch on side", "captured",
    ]  # fmt: skip
    assert (found.outputs, found.pool, cuda.current.name) == ((None, 3), (0, 1), "main")
    found.replay()
    assert cuda.log[-1] == "replayed"
    recorder.record(lambda: (), device, (5, 6))
    assert ("capture on", "side", (5, 6)) in cuda.log, "what shares memory is captured on one stream"


def test_a_capture_that_is_broken_off(cuda: SimpleNamespace) -> None:
    """The first error is the one that is told, the stream is the caller's again, and the pool is given back."""

    def call() -> tuple[Any, ...]:
        if cuda.current.name == "side":
            cuda.fails = RuntimeError("CUDA error: operation failed due to a previous error during capture")
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return ()

    recorder, device = CudaRecorder(), torch.device("cuda", 0)
    with pytest.raises(RuntimeError) as raised:
        recorder.record(call, device, None)
    assert _first_line(raised.value) == "CUDA error: operation not permitted when stream is capturing"
    assert cuda.log[-2:] == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))]
    assert gc.isenabled()
    assert cuda.current.name == "main"
    cuda.fails = None
    recorder.record(lambda: (), device, None)
    assert ("capture on", "side 2", (0, 1)) in cuda.log, "a broken stream is not used again"


def test_an_error_of_the_call_s_own(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture then ends in order, and torch has given the pool back itself."""

    def ended(*given: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def call() -> tuple[Any, ...]:
        if cuda.current.name == "side":
            raise ValueError("only while it is captured")
        return ()

    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", ended)
    with pytest.raises(ValueError, match="only while"):
        CudaRecorder().record(call, torch.device("cuda", 0), None)
    assert "captured" in cuda.log
    assert not any("_cuda_releasePool" in entry for entry in cuda.log)


def test_streams_wait_for_each_other(cuda: SimpleNamespace) -> None:
    recorder, seen = CudaRecorder(), []
    buffer: Any = SimpleNamespace(device=torch.device("cuda", 0), record_stream=lambda stream: seen.append(stream.name))
    recorder.wait([buffer])
    recorder.wait([buffer])
    assert cuda.log == []
    cuda.current = Stream(cuda.log, "other")
    recorder.wait([buffer])
    assert (cuda.log, seen) == ([("other", "waits for", "main")], ["other"])


def test_a_stream_that_is_being_recorded_is_left_alone() -> None:
    fake = Fake()
    call = Replayed(double, recorder=fake)
    fake.busy = True
    call(torch.ones(2))
    assert (fake.records, call.reasons) == ([], [])


@pytest.mark.parametrize(("plain", "replayed"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_one_stays(plain: float, replayed: float) -> None:
    def measure(calls: dict[str, Any], rounds: int) -> dict[str, Measurement]:
        assert all(torch.equal(run()[0], torch.full((2,), 2.0)) for run in calls.values())
        return {name: Measurement(name, {"plain": plain, "replayed": replayed}[name], 0.0, rounds) for name in calls}

    fake = Fake()
    call = Replayed(double, recorder=fake, measure=measure)
    call(torch.ones(2))
    before = fake.replays
    call(torch.ones(2))
    assert fake.replays - before == (1 if replayed < plain else 0)
    assert call.reasons == ([] if replayed < plain else ["a replay with its copies took 2000000 us, the plain call 1000000 us"])


def test_numbers_of_the_host_that_were_edited() -> None:
    """A constant on the host is read when launches are recorded; what was recorded is void once it was written to."""
    step = torch.zeros(())

    def add(x: Tensor) -> tuple[Any, ...]:
        return (x + step.item(),)

    fake = Fake()
    call = Replayed(add, held=[step], recorder=fake)
    call(torch.ones(2))
    step.add_(5)
    assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 6.0))
    assert len(fake.records) == 2
    for number in range(6, 10):
        step.add_(1)
        assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 1.0 + number))
    assert len(fake.records) == 3, "what changes all the time is not recorded"
    assert "changes between calls" in call.reasons[0]
    with torch.inference_mode():
        uncounted = torch.zeros(())
    call = Replayed(add, held=[uncounted], recorder=fake)
    call(torch.ones(2))
    assert (call.forms, len(call.reasons)) == (0, 1)


@pytest.mark.parametrize("lies", ["expanded", "every other", "transposed", "no elements", "number"])
def test_inputs_of_any_layout(lies: str) -> None:
    x = {
        "expanded": torch.randn(4, 1, 3).expand(4, 5, 3), "every other": torch.randn(4, 6)[:, ::2], "transposed": torch.randn(3, 4).t(),
        "no elements": torch.ones(0, 3), "number": torch.tensor(3.0),
    }[lies]  # fmt: skip
    strides = []

    def call(value: Tensor) -> tuple[Any, ...]:
        strides.append(value.stride())
        return (value * 2,)

    replayed = Replayed(call, recorder=Fake())
    for given in (x, x):
        assert torch.equal(replayed(given)[0], x * 2)
    assert replayed.forms == 1
    assert set(strides) == {x.stride()}


def test_inference_mode_and_gradients() -> None:
    call = Replayed(double, recorder=Fake())
    with torch.inference_mode():
        call(torch.ones(2))
    x = torch.full((2,), 3.0, requires_grad=True)
    found = call(x)[0]
    assert torch.equal(found, torch.full((2,), 6.0))
    assert not found.requires_grad
    assert not found.is_inference()


def test_several_threads() -> None:
    call, wrong = Replayed(double, recorder=Fake()), []

    def run(value: float) -> None:
        for _ in range(50):
            found = call(torch.full((64,), value))[0]
            if not torch.equal(found, torch.full((64,), 2 * value)):
                wrong.append(value)

    threads = [Thread(target=run, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reasons_are_few() -> None:
    call = Replayed(double, recorder=Fake())
    for rows in range(1, 100):
        call(torch.ones(rows))
    assert len(call.reasons) == MOST_REASONS
