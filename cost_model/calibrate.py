"""Calibration: what this machine's runtimes really reach, measured through the Runtime protocol on small graphs.

A runtime that compiles in no time gets a graph per probe; for one that takes long, all probes of a dtype stand in one graph, and those that are not
being measured get zero rows. Repeats are interleaved over all probes and runtimes, so that a disturbance hits no single figure; a low percentile is
kept, with the spread. Nothing is measured twice on one machine: samples are cached per runtime by fingerprint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache as remember
from typing import Any

import numpy
import torch
from torch import Tensor

from paretorch.cost_model import fingerprint
from paretorch.cost_model.curves import Calibration, Sample
from paretorch.cost_model.devices import Device, Target, cpu_model
from paretorch.cost_model.measure import burst
from paretorch.cost_model.panels import Panel, cache_bytes, compile_panels, forget_inputs, near_cache_bytes
from paretorch.cost_model.probes import DISPATCH, Probe, static_graph
from paretorch.cost_model.rates import analytic, derive
from paretorch.cost_model.work import Work, work_of
from paretorch.ir.collector import uncollected
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Runtime
from paretorch.ir.types import DTYPES

QUICK_SECONDS, THOROUGH_SECONDS = 3.5, 30.0  # of measuring, beside compiling
QUICK_ROUNDS, THOROUGH_ROUNDS = 7, 15
FEWEST_ROUNDS = 3
BURST, BURST_SECONDS = 8, 1e-3  # calls of one probe in a round: short ones are repeated, since one disturbance is as long as many of them
WHOLE_SECONDS = 10e-3  # the same for blocks, of which there are few and on which all prices hang
LOW = 25  # the percentile that is kept: what a probe takes when nothing disturbs it
CONTRADICTION = 2.0
DERIVED = {"inductor": "eager"}  # compiling takes too long to measure curves: rates follow from another runtime's
FLOOR_S = 2e-8
BUSY_SPREAD = 0.8  # interquartile range over median that a tenth of the samples exceed: up to 0.55 when idle, from 0.87 when busy
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
class _Run:
    """One probe at one number of rows, with its samples. Its inputs are made when it is measured, and kept."""

    panel: Panel
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
    Both forms take tens of seconds where nothing is in the cache. cache=False measures anew and keeps the result.
    """
    place = "cuda" if device is not None and device.kind in ("cuda", "rocm") else "cpu"
    wanted = _with_bases(runtimes)
    samples: dict[str, tuple[Sample, ...]] = {}
    notes: dict[str, str] = {}
    for name in wanted:
        kept = _kept(name, thorough, place) if cache else None
        if kept is not None:
            samples[name] = kept
    missing = {name: runtime for name, runtime in wanted.items() if name not in samples}
    if missing:
        with uncollected():
            samples |= _measure(missing, thorough, place, clock, notes)
    for name in missing:
        problem = fingerprint.write(fingerprint.fingerprint(name, thorough, place), samples[name], date.today().isoformat())
        if problem is not None:
            notes["cache"] = problem
    measured = tuple(sample for name in sorted(samples) for sample in samples[name])
    if not any(sample.curve == "matrix" for sample in measured):
        raise TargetError(f"none of the runtimes {', '.join(runtimes) or '(none given)'} could run a single probe here")
    derived = {name: DERIVED[name] for name in runtimes if name in DERIVED}
    facts = {"processor": cpu_model(), "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    facts |= {"device row": _peaks(device or Target.parse("cpu").device), **notes}
    disturbed = _disturbed(measured)
    facts |= {"disturbed": disturbed} if disturbed else {}
    rates = derive(measured, derived)
    for name in sorted(set(runtimes) - {runtime for runtime, _ in rates}):
        base = next(iter(sorted({runtime for runtime, _ in rates})))
        rates |= {(name, dtype): found for (runtime, dtype), found in rates.items() if runtime == base}
        facts[f"{name} not measured"] = f"the rates of {base} are used"
    found = Calibration("this machine", rates, cache_bytes(), measured, facts, _bandwidth(measured), near_cache_bytes())
    if device is not None:
        _refuse_contradiction(found, device, place)
    return found


def _disturbed(measured: Sequence[Sample]) -> str | None:
    """A sentence if the samples of a runtime spread so much that the machine must have been busy with something else."""
    for name in sorted({sample.runtime for sample in measured}):
        spread = float(numpy.percentile([sample.spread for sample in measured if sample.runtime == name], 90))
        if spread > BUSY_SPREAD:
            return (
                f"the machine was busy while {name} was calibrated (a tenth of its samples spread by {spread:.0%} and more): predictions may be far "
                "off until `paretorch calibrate` has run on an idle machine; what is handed out was measured all the same"
            )
    return None


def _peaks(row: Device) -> str:
    """The row's own figures, to read the measured ones against."""
    peaks = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in row.peak_flops_per_s.items())
    return f"{row.name}, at most {peaks}, memory {row.bandwidth_bytes_per_s / 1e9:,.0f} GB/s ({row.source})"


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


# measuring


def _measure(
    runtimes: Mapping[str, Runtime], thorough: bool, place: str, clock: Callable[[], float], problems: dict[str, str]
) -> dict[str, tuple[Sample, ...]]:
    """Samples by runtime. problems: gets what could not be compiled, with the reason."""
    panels = compile_panels(runtimes, thorough, place, problems)
    runs = [run for panel in panels for run in _runs(panel)]
    seconds, rounds = (THOROUGH_SECONDS, THOROUGH_ROUNDS) if thorough else (QUICK_SECONDS, QUICK_ROUNDS)
    shuffle, order, began = random.Random(0), list(runs), clock()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and clock() - began > seconds:
            break
        shuffle.shuffle(order)
        for run in order:
            whole = run.probe is not None and run.probe.is_whole
            run.samples += burst(run.call, WHOLE_SECONDS if whole else BURST_SECONDS, BURST, clock)
    forget_inputs()
    found: dict[str, list[Sample]] = {name: [] for name in runtimes}
    for name, samples in found.items():
        own = [run for run in runs if run.panel.runtime == name]
        idle = _idle_seconds(own)
        samples += [_sample(run, run.probe, idle[id(run.panel)]) for run in own if run.probe is not None]
    return {name: tuple(samples) for name, samples in found.items()}


def _idle_seconds(runs: Sequence[_Run]) -> dict[int, float]:
    """What a call of each panel takes beside the work of its probes: of a panel of many what it takes with no rows, of a lone one dispatch."""
    found = {id(run.panel): _low(run.samples) for run in runs if run.probe is None}
    launch = next((_low(run.samples) / run.panel.nodes for run in runs if run.probe == DISPATCH), 0.0)
    for run in runs:
        if len(run.panel.probes) == 1:
            keeps_dispatch = run.probe is not None and (run.probe == DISPATCH or run.probe.is_whole)
            found[id(run.panel)] = 0.0 if keeps_dispatch else launch * run.panel.nodes
    return found


def _runs(panel: Panel) -> list[_Run]:
    active = [_Run(panel, probe, rows, panel.call(probe, rows)) for probe in panel.probes for rows in panel.sizes(probe)]
    return active if len(panel.probes) == 1 else [_Run(panel, None, 0, panel.call(None, 0)), *active]


def _low(samples: Sequence[float]) -> float:
    return float(numpy.percentile(samples, LOW))


def _sample(run: _Run, probe: Probe, idle: float) -> Sample:
    works = _works(probe, run.rows, run.panel.dtype)
    main = works[-1] if probe.curve != "matrix" else works[0]
    amount = (
        (main.flops if main.is_rated_by_flops else main.bytes_moved) if probe.curve in main.curves else sum(w.bytes_moved for w in works)
    )
    seconds = max(_low(run.samples) - idle, RESOLUTION * idle, FLOOR_S) / (probe.repeats * probe.ops)
    middle = float(numpy.median(run.samples))
    spread = float(numpy.subtract(*numpy.percentile(run.samples, [75, 25]))) / middle if middle > 0 else 0.0
    return Sample(run.panel.runtime, run.panel.dtype, probe.curve, main.at, amount, seconds, spread)


@remember
def _works(probe: Probe, rows: int, dtype: str) -> tuple[Work, ...]:
    """The work of each node of a link. In half precision it is that of f32 with half the bytes: tracing takes longer than what is measured."""
    if dtype == "f32":
        return tuple(work_of(node) for node in static_graph(probe, rows, dtype).calls)
    share = DTYPES[dtype].itemsize / DTYPES["f32"].itemsize
    return tuple(_narrowed(work, share, dtype) for work in _works(probe, rows, "f32"))


def _narrowed(work: Work, share: float, dtype: str) -> Work:
    at = work.at if work.is_rated_by_flops else tuple(share * place for place in work.at)
    return replace(work, at=at, bytes_moved=share * work.bytes_moved, dtype=dtype, constant_bytes=share * work.constant_bytes)


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
