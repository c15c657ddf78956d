"""Panels: probes compiled for one runtime, so that calibration can call them at any number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from paretorch.cost_model.devices import cache_sizes, shared_cache_bytes
from paretorch.cost_model.probes import DISPATCH, GPU_PROBES, PROBES, TINY_ROWS, WHOLES, Probe, cold_probe, forget_values, panel
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Runtime

DTYPES = ("f32", "bf16")
CHEAP_COMPILE_S = 0.05  # a runtime that compiles a probe in less gets a graph for each
SHORT_CHAIN = 4  # the longest chains that are compiled at half precision where compiling takes long
LARGEST_COLD_BYTES = 48e6  # a larger cache is not overflowed by calibration: weights are then taken to stay in it


@dataclass
class Panel:
    """A compiled graph of probes. idle: inputs with which no probe does anything; widen: inputs are f32 whatever the dtype.

    rows: the only size that it takes, of a block that is compiled as models are; None where it takes any.
    """

    runtime: str
    dtype: str
    probes: tuple[Probe, ...]
    nodes: int
    execute: Executable
    idle: tuple[Tensor, ...]
    widen: bool
    place: str
    compile_s: float
    rows: int | None = None

    def sizes(self, probe: Probe) -> tuple[int, ...]:
        """The sizes at which a probe can be run here."""
        return probe.rows if self.rows is None else (self.rows,)

    def call(self, probe: Probe | None, rows: int) -> Callable[[], Any]:
        """A call in which this probe has so many rows, and the others are idle."""
        inputs = list(self.idle)
        if probe is not None:
            inputs[self.probes.index(probe)] = _input(probe, rows, "f32" if self.widen else self.dtype, self.place)
        return lambda: self.execute(*inputs)


def forget_inputs() -> None:
    """Free the inputs of probes, which panels share, and the values of constants."""
    _input.cache_clear()
    forget_values()


def cache_bytes() -> float:
    """What this machine's largest cache holds."""
    return shared_cache_bytes() or LARGEST_COLD_BYTES


def near_cache_bytes() -> float:
    """What the largest cache that a core has to itself holds: the last but one."""
    return cache_sizes()[-2] if len(cache_sizes()) > 1 else float("inf")


def compile_panels(runtimes: Mapping[str, Runtime], thorough: bool, place: str, problems: dict[str, str]) -> list[Panel]:
    """The compiled graphs of all runtimes, of each dtype that they take; problems gets the reasons for what they do not take.

    Runtimes take turns on the same graph, so that those with a common intermediate form may make it once.
    """
    chosen = tuple(probe for probe in PROBES if thorough or probe.quick) + (GPU_PROBES if place == "cuda" else ())
    found = [_compile(name, runtime, (DISPATCH,), "f32", place, problems, TINY_ROWS) for name, runtime in runtimes.items()]
    cheap = {made.runtime for made in found if made is not None and made.compile_s < CHEAP_COMPILE_S}
    for dtype in DTYPES:
        probes = chosen if dtype == "f32" else tuple(probe for probe in chosen if probe.half)
        if dtype == "f32" and place == "cpu" and cache_bytes() <= LARGEST_COLD_BYTES:
            probes = (*probes, cold_probe(cache_bytes(), dtype))
        able = {}
        for name, runtime in runtimes.items():
            refusal = runtime.refuses(_graph(probes[:1], dtype, dtype != "f32", TINY_ROWS, place))
            if refusal is None:
                able[name] = runtime
            else:
                problems[f"{name} {dtype}"] = refusal
        for name, runtime in able.items():
            if name in cheap:
                found += [_compile(name, runtime, (probe,), dtype, place, problems, TINY_ROWS) for probe in probes if not probe.composite]
            elif thorough or dtype == "f32":  # else blocks alone; rates follow from those at f32
                few = tuple(probe for probe in probes if dtype == "f32" or probe.repeats <= SHORT_CHAIN)
                found += _compile_or_halve(name, runtime, few, dtype, place, problems)
        for whole in WHOLES:
            for name, runtime in able.items():
                if not thorough and dtype != "f32" and whole != WHOLES[0] and name not in cheap:
                    continue  # what a whole model takes in fewer bits is measured where that is offered
                found += [
                    _compile(name, runtime, (whole,), dtype, place, problems, rows) for rows in whole.rows[0 if name in cheap else -1 :]
                ]
    _graph.cache_clear()
    return [made for made in found if made is not None]


def _compile_or_halve(
    name: str, runtime: Runtime, probes: tuple[Probe, ...], dtype: str, place: str, problems: dict[str, str]
) -> list[Panel | None]:
    """One panel, or several if a probe among them cannot be compiled: that one is then left out, with its reason."""
    made = _compile(name, runtime, probes, dtype, place, problems)
    if made is not None or len(probes) == 1:
        return [made]
    middle = len(probes) // 2
    halves = probes[:middle], probes[middle:]
    return [part for half in halves for part in _compile_or_halve(name, runtime, half, dtype, place, problems)]


def _compile(
    name: str, runtime: Runtime, probes: tuple[Probe, ...], dtype: str, place: str, problems: dict[str, str], rows: int | None = None
) -> Panel | None:
    """A panel; None if the runtime takes no such graph, in its own dtype or widened to f32 at inputs and outputs.

    rows: of the graph's types; None for symbols, which a runtime that runs the graph as it stands does not need.
    """
    only = rows if probes[0].is_whole else None
    key = f"{name} {dtype}" + (f" {probes[0].name}" if len(probes) == 1 else "")
    for widen in (False, True) if dtype != "f32" else (False,):
        given = "f32" if widen else dtype
        graph = _graph(probes, dtype, widen, rows, place)
        if runtime.refuses(graph) is not None:
            continue
        examples = tuple(_input(probe, rows or 2 + i, given, place) for i, probe in enumerate(probes))
        began = time.perf_counter()
        try:
            execute = runtime.compile(graph, examples)
            took = time.perf_counter() - began
            idle = examples if only else tuple(_input(probe, probe.idle_rows, given, place) for probe in probes)
            execute(*idle)
        except Exception as error:  # runtimes raise many kinds; the calibration says which dtype has no rates of its own, and why
            problems[key] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            continue
        problems.pop(f"{name} {dtype}", None)  # what a panel of more probes had, or this one without widening
        problems.pop(key, None)
        return Panel(name, dtype, probes, len(graph.calls), execute, idle, widen, place, took, only)
    return None


@cache
def _graph(probes: tuple[Probe, ...], dtype: str, widen: bool, rows: int | None, place: str) -> Graph:
    with torch.device(place):
        return panel(probes, dtype, widen, rows)


@cache
def _input(probe: Probe, rows: int, dtype: str, place: str) -> Tensor:
    return probe.input(rows, dtype, place)
