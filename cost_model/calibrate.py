"""Calibration: what this machine's runtimes really reach, measured through the Runtime protocol on small graphs.

A runtime that compiles in no time gets a graph per probe; for one that takes long, all probes of a dtype stand in one graph, and those that are not
being measured get zero rows. Repeats are interleaved over all probes and runtimes, so that a disturbance hits no single figure; a low percentile is
kept, with the spread. Nothing is measured twice on one machine: samples are cached per runtime by fingerprint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache as remember
from typing import Any

import numpy
import torch
from torch import Tensor

from paretorch.cost_model import fingerprint
from paretorch.cost_model.curves import Calibration, Sample
from paretorch.cost_model.devices import Device, cpu_model, shared_cache_bytes
from paretorch.cost_model.measure import burst
from paretorch.cost_model.probes import GPU_PROBES, PROBES, Probe, cold_probe, panel, static_graph
from paretorch.cost_model.rates import analytic, derive
from paretorch.cost_model.work import Work, work_of
from paretorch.ir.errors import LoweringError, TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Runtime

DTYPES = ("f32", "bf16")
QUICK_SECONDS, THOROUGH_SECONDS = 7.0, 30.0  # of measuring, beside compiling
QUICK_ROUNDS, THOROUGH_ROUNDS = 7, 15
FEWEST_ROUNDS = 3
BURST, BURST_SECONDS = 8, 1e-3  # calls of one probe in a round: short ones are repeated, since one disturbance is as long as many of them
LOW = 10  # the percentile that is kept: what a probe takes when nothing disturbs it
CHEAP_COMPILE_S = 0.05  # a runtime that compiles a probe in less gets a graph for each
LARGEST_COLD_BYTES = 48e6  # a larger cache is not overflowed by calibration: its weights are then taken to stay in it
CONTRADICTION = 2.0
DERIVED = {"inductor": "eager"}  # compiling takes too long to measure curves: rates follow from another runtime's
FLOOR_S = 2e-8
RESOLUTION = 0.01  # what takes less than this share of an idle call cannot be told from it

__all__ = ["analytic", "calibrate"]


class _PlainTorch:
    """The graph as torch runs it: what derived rates start from where the caller has no eager runtime."""

    name = "eager"

    def refuses(self, graph: Graph | None = None) -> str | None:
        return None

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        return graph.run


@dataclass
class _Panel:
    """A compiled graph of probes. idle: the inputs with zero rows; idle_samples: seconds of a call in which nothing is active."""

    runtime: str
    dtype: str
    probes: tuple[Probe, ...]
    nodes: int
    execute: Executable
    idle: tuple[Tensor, ...]
    widen: bool
    place: str
    idle_samples: list[float] = field(default_factory=list)

    def call(self, probe: Probe | None, rows: int) -> Callable[[], Any]:
        """A call in which this probe has so many rows."""
        inputs = list(self.idle)
        if probe is not None:
            inputs[self.probes.index(probe)] = probe.input(rows, "f32" if self.widen else self.dtype, self.place)
        return lambda: self.execute(*inputs)


@dataclass
class _Run:
    """One probe at one number of rows, with its samples. Its inputs are made when it is measured, and kept."""

    panel: _Panel
    probe: Probe | None
    rows: int
    call: Callable[[], Any]
    samples: list[float] = field(default_factory=list)


def calibrate(
    runtimes: Mapping[str, Runtime], *, device: Device | None = None, thorough: bool = False, cache: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:  # fmt: skip
    """Rates of these runtimes on this machine, from the cache where its fingerprint still holds.

    device: the row of what is measured; a GPU is refused with TargetError if a measurement contradicts its row by more than twice.
    The quick form takes under 15 s on two cores, the thorough one under a minute. cache=False measures anew and keeps the result.
    """
    place = "cuda" if device is not None and device.kind in ("cuda", "rocm") else "cpu"
    wanted = _with_bases(runtimes)
    samples, notes = {}, {}
    for name in wanted:
        kept = _kept(name, thorough, place) if cache else None
        if kept is not None:
            samples[name] = kept
    missing = {name: runtime for name, runtime in wanted.items() if name not in samples}
    if missing:
        samples |= _measure(missing, thorough, place, clock)
    for name in missing:
        problem = fingerprint.write(fingerprint.fingerprint(name, thorough, place), samples[name], date.today().isoformat())
        if problem is not None:
            notes["cache"] = problem
    measured = tuple(sample for name in sorted(samples) for sample in samples[name])
    if not measured:
        raise TargetError(f"none of the runtimes {', '.join(runtimes) or '(none given)'} could run a single probe here")
    derived = {name: DERIVED[name] for name in runtimes if name in DERIVED}
    facts = {"processor": cpu_model(), "threads": str(torch.get_num_threads()), "torch": torch.__version__, **notes}
    found = Calibration("this machine", derive(measured, derived), _cache_bytes(), measured, facts, _bandwidth(measured))
    if device is not None:
        _refuse_contradiction(found, device, place)
    return found


def _with_bases(runtimes: Mapping[str, Runtime]) -> dict[str, Runtime]:
    """The runtimes to measure: those given, with derived ones replaced by what they derive from."""
    wanted = {name: runtime for name, runtime in runtimes.items() if name not in DERIVED}
    if any(name in DERIVED for name in runtimes):
        wanted.setdefault("eager", _PlainTorch())
    return wanted


def _kept(name: str, thorough: bool, place: str) -> tuple[Sample, ...] | None:
    """Cached samples; those of the thorough form serve the quick one as well."""
    best = fingerprint.read(fingerprint.fingerprint(name, True, place))
    return best if best is not None or thorough else fingerprint.read(fingerprint.fingerprint(name, False, place))


def _cache_bytes() -> float:
    return shared_cache_bytes() or LARGEST_COLD_BYTES


# measuring


def _measure(
    runtimes: Mapping[str, Runtime], thorough: bool, place: str, clock: Callable[[], float]
) -> dict[str, tuple[Sample, ...]]:  # fmt: skip
    """Samples by runtime."""
    panels = [panel for name, runtime in runtimes.items() for panel in _panels(name, runtime, thorough, place, clock)]
    runs = [run for panel in panels for run in _runs(panel)]
    seconds, rounds = (THOROUGH_SECONDS, THOROUGH_ROUNDS) if thorough else (QUICK_SECONDS, QUICK_ROUNDS)
    shuffle, order, began = random.Random(0), list(runs), clock()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and clock() - began > seconds:
            break
        shuffle.shuffle(order)
        for run in order:
            run.samples += burst(run.call, BURST_SECONDS, BURST, clock)
    idle = {id(run.panel): _low(run.samples) for run in runs if run.probe is None}
    found = {name: [_overhead(panels, name, idle)] for name in runtimes if any(panel.runtime == name for panel in panels)}
    for run in runs:
        if run.probe is not None:
            found[run.panel.runtime].append(_sample(run, run.probe, idle[id(run.panel)]))
    return {name: tuple(found.get(name, ())) for name in runtimes}


def _runs(panel: _Panel) -> list[_Run]:
    active = [_Run(panel, probe, rows, panel.call(probe, rows)) for probe in panel.probes for rows in probe.rows]
    return [_Run(panel, None, 0, panel.call(None, 0)), *active]


def _low(samples: Sequence[float]) -> float:
    return float(numpy.percentile(samples, LOW))


def _overhead(panels: Sequence[_Panel], name: str, idle: Mapping[int, float]) -> Sample:
    """Seconds of dispatch per node: of calls in which every node meets empty tensors. `amount` counts nodes."""
    own = [panel for panel in panels if panel.runtime == name]
    each = [idle[id(panel)] / panel.nodes for panel in own]
    return Sample(name, "f32", "launch", (1.0,), 1.0, max(float(numpy.median(each)), FLOOR_S), 0.0)


def _sample(run: _Run, probe: Probe, idle: float) -> Sample:
    works = _works(probe, run.rows, run.panel.dtype)
    main = works[-1] if probe.curve != "matrix" else works[0]
    amount = (
        (main.flops if main.is_rated_by_flops else main.bytes_moved) if probe.curve in main.curves else sum(w.bytes_moved for w in works)
    )
    seconds = max(_low(run.samples) - idle, RESOLUTION * idle, FLOOR_S) / probe.repeats
    middle = float(numpy.median(run.samples))
    spread = float(numpy.subtract(*numpy.percentile(run.samples, [75, 25]))) / middle if middle > 0 else 0.0
    return Sample(run.panel.runtime, run.panel.dtype, probe.curve, main.at, amount, seconds, spread)


@remember
def _works(probe: Probe, rows: int, dtype: str) -> tuple[Work, ...]:
    return tuple(work_of(node) for node in static_graph(probe, rows, dtype).calls)


# compiling


def _panels(name: str, runtime: Runtime, thorough: bool, place: str, clock: Callable[[], float]) -> list[_Panel]:
    """The compiled graphs of one runtime, of each dtype that it takes."""
    chosen = tuple(probe for probe in PROBES if thorough or probe.quick) + (GPU_PROBES if place == "cuda" else ())
    began = clock()
    first = _compile(name, runtime, chosen[:1], "f32", place)
    is_cheap = clock() - began < CHEAP_COMPILE_S
    if first is None:
        return []
    found = [first]
    for dtype in DTYPES:
        probes = chosen[1:] if dtype == "f32" else tuple(probe for probe in chosen if probe.half)
        if dtype == "f32" and place == "cpu" and _cache_bytes() <= LARGEST_COLD_BYTES:
            probes = (*probes, cold_probe(_cache_bytes(), dtype))
        groups = [(probe,) for probe in probes] if is_cheap else [probes]
        found += [
            compiled for group in groups if (compiled := _compile(name, runtime, group, dtype, place, 2 if is_cheap else None)) is not None
        ]
    return found


def _compile(name: str, runtime: Runtime, probes: tuple[Probe, ...], dtype: str, place: str, rows: int | None = None) -> _Panel | None:
    """A panel; None if the runtime takes no such graph, in its own dtype or widened to f32 at inputs and outputs.

    rows: of the graph's types; None for symbols, which a runtime that runs the graph as it stands does not need.
    """
    for widen in (False, True) if dtype != "f32" else (False,):
        with torch.device(place):
            graph = panel(probes, dtype, widen, rows)
        if runtime.refuses(graph) is not None:
            continue
        examples = tuple(probe.input(2 + i, "f32" if widen else dtype, place) for i, probe in enumerate(probes))
        try:
            execute = runtime.compile(graph, examples)
            idle = tuple(example[:0] for example in examples)
            execute(*idle)
        except (LoweringError, RuntimeError):  # this dtype then has no rates of its own, and f32's are used for it
            continue
        return _Panel(name, dtype, probes, len(graph.calls), execute, idle, widen, place)
    return None


# checking against the device row


def _bandwidth(samples: Sequence[Sample]) -> float:
    """The best bytes per second of a pass over memory that is larger than what caches hold, else of the largest."""
    passes = [s for s in samples if s.curve == "elementwise"]
    largest = max((s.amount for s in passes), default=0.0)
    return max((s.amount / s.seconds for s in passes if s.amount == largest), default=0.0)


def _refuse_contradiction(found: Calibration, device: Device, place: str) -> None:
    """Raises TargetError if a GPU is more than twice as fast or as slow as its row; of a CPU, whose row is generic, nothing is demanded."""
    if place == "cpu":
        return
    expected = device.bandwidth_bytes_per_s
    measured = found.bandwidth_bytes_per_s
    if not expected / CONTRADICTION <= measured <= expected * CONTRADICTION:
        raise TargetError(
            f"the device row {device.name} says {expected / 1e9:.0f} GB/s of memory bandwidth; {measured / 1e9:.0f} GB/s were measured. "
            "The row is another device's, or something else is using this one; plan for the right chip, or try again when it is idle."
        )
    best = max((s.amount / s.seconds for s in found.samples if s.curve == "matrix" and s.dtype == "bf16"), default=0.0)
    if best > CONTRADICTION * device.peak("bf16"):
        raise TargetError(
            f"the device row {device.name} says {device.peak('bf16') / 1e12:.0f} TFLOP/s at bf16; {best / 1e12:.0f} were measured"
        )
