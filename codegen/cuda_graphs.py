"""CUDA graphs: the launches of a call, recorded once for each form of its inputs and replayed as one, so that starting kernels costs next to nothing.

Graphed(runtime).compile(graph, inputs)   -> what the runtime compiles, replayed where that can be done and is no slower
Replayed(execute, ...)(*inputs)           -> the outputs of execute(*inputs)

A replay runs in memory of its own: the inputs of a call are copied there, and its outputs copied out, so that no result is overwritten by a later
call. The form of a call is the shape, strides, dtype and device of each input. A graph of fixed sizes is recorded for the first form; one of varying
sizes for each form that comes twice, and the forms that were not used for longest are dropped. Where the rows of a batch know nothing of each other,
one recording serves a bucket of their numbers (`buckets`): rows that a call lacks are repeated ones, and are not returned.

Everything else is a plain call, with the reason in `reasons`: inputs that are not on a CUDA device (a number of the host would be recorded as it was),
a graph whose sizes depend on values, a capture that CUDA refused, a replay that took longer than the plain call, since copying large inputs costs time
too. Calls from several threads replay one after another, and each stream waits for the last replay of another. The recordings of one executable share
their memory: they never run at the same time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from paretorch.codegen.buckets import Rows, rows_of
from paretorch.codegen.runtimes import is_dynamic
from paretorch.ir.collector import uncollected
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Measure, Runtime

MOST_FORMS = 16  # that are kept of a graph of varying sizes
MOST_REASONS = 16
MOST_EDITS = 2  # of constants on the host, after each of which recordings are made anew
WARM_UPS = 3  # calls before a capture: kernels are compiled, and libraries make their workspaces
ROUNDS = 3  # of the race between a replay and the plain call
Form = tuple[Any, ...]
_CAPTURES = Lock()  # CUDA takes one capture of a process at a time


@dataclass(frozen=True)
class Recording:
    """replay: runs what was recorded, in its own memory; outputs: where it leaves its results; pool: the memory, None for one that cannot be shared."""

    replay: Callable[[], object]
    outputs: tuple[Any, ...]
    pool: Any = None


class Recorder(Protocol):
    """What records calls: CUDA, or a stand-in for it in tests."""

    def refuses(self, inputs: Sequence[Tensor]) -> str | None:
        """None, or why calls with these inputs cannot be recorded."""

    def is_busy(self) -> bool:
        """Whether the current stream is being recorded by someone else."""

    def wait(self, buffers: Sequence[Tensor]) -> None:
        """Let the current stream wait for the last replay, if that was on another."""

    def record(self, call: Callable[[], tuple[Any, ...]], device: torch.device, pool: Any) -> Recording:
        """Warm up and record. pool: of a living recording on that device, or None. Raises whatever the capture raises."""


class CudaRecorder:
    """Captures into `torch.cuda.CUDAGraph`, on a stream of its own."""

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def refuses(self, inputs: Sequence[Tensor]) -> str | None:
        devices = list(dict.fromkeys(str(x.device) for x in inputs))
        if not devices:
            return "it has no inputs"
        if len(devices) > 1 or inputs[0].device.type != "cuda":
            return f"its inputs are on {', '.join(devices)}; a recording takes one CUDA device"
        return None

    def is_busy(self) -> bool:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def wait(self, buffers: Sequence[Tensor]) -> None:
        device = buffers[0].device
        current, last = torch.cuda.current_stream(device), self._last.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
            for buffer in buffers:
                buffer.record_stream(current)
        self._last[device] = current

    def record(self, call: Callable[[], tuple[Any, ...]], device: torch.device, pool: Any) -> Recording:
        with _CAPTURES, torch.cuda.device(device), uncollected():  # a collection would end CUDA objects in the midst of a capture
            current, warm = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            # not the warm one, since what libraries keep for a stream then lies outside of the pool
            side = self._sides.get(device) or torch.cuda.Stream(device)
            self._sides[device] = side
            warm.wait_stream(current)
            with torch.cuda.stream(warm):
                for _ in range(WARM_UPS):
                    call()
            current.wait_stream(warm)
            graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
            try:  # the outer stream context is left even where the capture cannot be ended
                with torch.cuda.stream(side), torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    outputs = call()
            except BaseException:
                del self._sides[device]
                _give_back(device, pool)
                raise
        return Recording(graph.replay, outputs, pool)


def _give_back(device: torch.device, pool: Any) -> None:
    """End a pool's allocations after a capture that CUDA broke off: torch leaves that out, and would go on asking the dead graph."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        torch.cuda.memory._cuda_endAllocateToPool(index, pool)  # type: ignore[attr-defined]
    except RuntimeError:  # the capture was ended in order: what was raised is the call's own error
        return
    torch.cuda.memory._cuda_releasePool(index, pool)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Kept:
    """A recording with the buffers that it reads. targets: of the buffers, each place in memory once; rows: those that a call may have fewer of."""

    buffers: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    recording: Recording
    rows: Rows

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        count, outputs = self.rows.count(inputs), self.recording.outputs
        for target, x, dim in zip(self.targets, inputs, self.rows.inputs, strict=True):
            _first(target, dim, count).copy_(_once(x))
        self.recording.replay()
        return tuple(
            _first(x, dim, count).clone() if isinstance(x, Tensor) else x for x, dim in zip(outputs, self.rows.outputs, strict=True)
        )


def _first(x: Tensor, dim: int | None, count: int | None) -> Tensor:
    """The first rows, all of it where it has none."""
    return x if dim is None or count is None else x.narrow(dim, 0, count)


class Replayed:
    """An executable whose calls are replayed where they can be; see the module's card.

    varies: whether sizes vary from call to call; rows: those of a batch that may be filled up, if there is one; held: the constants that the call
    reads; measure: races a replay with the plain call, which stays if it wins; None replays in any case. reasons: of plain calls, the first 16.
    """

    def __init__(
        self, execute: Executable, *, varies: bool = False, rows: Rows | None = None, held: Sequence[Tensor] = (),
        recorder: Recorder | None = None, measure: Measure | None = None, note: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        self.execute, self.varies, self.rows, self.measure, self.note = execute, varies, rows, measure, note
        self.recorder: Recorder = recorder or CudaRecorder()
        self.reasons: list[str] = []
        self._of_host = [x for x in held if x.device.type == "cpu"]
        self._kept: OrderedDict[Form, _Kept | None] = OrderedDict()  # None: this form is called plainly
        self._seen: OrderedDict[Form, None] = OrderedDict()  # forms that came once
        self._edits, self._changes = self._edits_of_host(), 0
        self._lock = Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        if self.recorder.is_busy():
            return self.execute(*inputs)
        with self._lock, torch.no_grad():
            kept = self._find(inputs)
            if kept is not None:
                self.recorder.wait(kept.buffers)
                return kept(inputs)
        return self.execute(*inputs)

    @property
    def forms(self) -> int:
        """How many forms are recorded."""
        return sum(kept is not None for kept in self._kept.values())

    def _find(self, inputs: Sequence[Tensor]) -> _Kept | None:
        """The recording for these inputs, made now if it is due; None for a plain call."""
        rows = self.rows if self.rows is not None and self.rows.count(inputs) is not None else None
        form = rows.form(inputs) if rows else tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        self._follow_edits()
        if form in self._kept:
            self._kept.move_to_end(form)
            return self._kept[form]
        if self._edits is None:
            self._plain("a constant on the host changes between calls, or may do so unseen, and would be recorded as it is")
            return None
        if not self.varies and self.forms:
            self._plain(f"called with {_shown(inputs)}, which is not what was recorded")
            return None
        if self.varies and not self._is_due(form):
            return None
        self._kept[form] = self._made(inputs, rows)
        while len(self._kept) > MOST_FORMS:
            self._kept.popitem(last=False)
        return self._kept[form]

    def _follow_edits(self) -> None:
        """Forget what was recorded with other numbers of the host; give up where they change again and again."""
        if not self._of_host or self._edits is None or (edits := self._edits_of_host()) == self._edits:
            return
        self._kept.clear()
        self._changes += 1
        self._edits = edits if self._changes <= MOST_EDITS else None

    def _is_due(self, form: Form) -> bool:
        """Whether a form has come before: a length that comes only once is not worth a recording."""
        if form in self._seen:
            del self._seen[form]
            return True
        self._seen[form] = None
        while len(self._seen) > 4 * MOST_FORMS:
            self._seen.popitem(last=False)
        return False

    def _made(self, inputs: Sequence[Tensor], rows: Rows | None) -> _Kept | None:
        """A new recording; None where it cannot be made, or a plain call takes no longer."""
        reason = self.recorder.refuses(inputs)
        if reason is not None:
            self._plain(reason)
            return None
        device = inputs[0].device
        beside = (kept for kept in self._kept.values() if kept is not None and kept.buffers[0].device == device)
        pool = next((kept.recording.pool for kept in beside), None)
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference_mode could not be copied into later
            try:
                buffers = tuple(_buffer(x) for x in (rows.raised(inputs) if rows else inputs))
                recording = self.recorder.record(lambda: tuple(self.execute(*buffers)), device, pool)
                alone = Rows((None,) * len(buffers), (None,) * len(recording.outputs))
                kept = _Kept(buffers, tuple(map(_once, buffers)), recording, rows or alone)
                return kept if self._pays(kept, inputs) else None
            except Exception as error:  # CUDA, its libraries and triton raise many kinds; the call then runs plainly, and says so
                self._plain(f"its launches cannot be recorded: {_first_line(error)}")
                return None

    def _pays(self, kept: _Kept, inputs: Sequence[Tensor]) -> bool:
        if self.measure is None:
            return True
        self.recorder.wait(kept.buffers)
        found = self.measure({"plain": lambda: self.execute(*inputs), "replayed": lambda: kept(inputs)}, ROUNDS)
        plain, replayed = found["plain"].seconds, found["replayed"].seconds
        if replayed > plain:
            self._plain(f"a replay with its copies took {replayed * 1e6:.0f} us, the plain call {plain * 1e6:.0f} us")
        return replayed <= plain

    def _plain(self, reason: str) -> None:
        if reason not in self.reasons and len(self.reasons) < MOST_REASONS:
            self.reasons.append(reason)
            if self.note is not None:
                self.note(reason)

    def _edits_of_host(self) -> tuple[int, ...] | None:
        """How often each constant on the host was edited; None if that is not counted."""
        return None if any(x.is_inference() for x in self._of_host) else tuple(x._version for x in self._of_host)


def _first_line(error: BaseException) -> str:
    """Of what went wrong first: ending a capture that was broken off fails, too."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or ["no message"])[0]


def _buffer(x: Tensor) -> Tensor:
    """Room for a tensor that lies as this one, with its values."""
    buffer = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    _once(buffer).copy_(_once(x))
    return buffer


def _once(x: Tensor) -> Tensor:
    """The part that an expanded tensor repeats; the tensor itself if it repeats nothing."""
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(axis, 0, 1)
    return x


def _shown(inputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} with strides {list(x.stride())}" for x in inputs)


class Graphed:
    """A runtime whose calls are replayed. runtime: what compiles; measure: see Replayed; notes: gets a sentence for each reason of a plain call."""

    def __init__(
        self, runtime: Runtime, measure: Measure | None = None, notes: list[str] | None = None, recorder: Recorder | None = None
    ) -> None:
        self.name, self.runtime, self.measure, self.recorder = runtime.name, runtime, measure, recorder
        self.notes = notes if notes is not None else []

    def refuses(self, graph: Graph | None = None) -> str | None:
        return self.runtime.refuses(graph)

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError as the runtime does."""
        execute, reason = self.runtime.compile(graph, example_inputs), waits_for_values(graph)
        if reason is not None:
            self._note(reason)
            return execute
        rows = rows_of(graph)
        return Replayed(
            execute,
            varies=is_dynamic(graph),
            rows=rows if isinstance(rows, Rows) else None,
            held=list(graph.constants.values()),
            recorder=self.recorder,
            measure=self.measure,
            note=self._note,
        )

    def _note(self, reason: str) -> None:
        text = f"{self.name} runs without a CUDA graph: {reason}"
        if text not in self.notes:
            self.notes.append(text)


def waits_for_values(graph: Graph) -> str | None:
    """A sentence if the host reads a value of this graph while it runs, to know a size or a number; such a graph cannot be recorded."""
    for node in graph.calls:
        reads_value = torch.Tag.data_dependent_output in getattr(node.target, "tags", ())
        if reads_value or any(map(free_unbacked_symbols, pytree.tree_leaves(node.meta.get("val")))):
            return f"{node.name} ({node.target}) waits for values that only the device knows"
    return None
