"""Panels: probes compiled for one runtime, so that calibration can call them at any number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretorch.cost_model.devices import shared_cache_bytes
from paretorch.cost_model.probes import DISPATCH, GPU_PROBES, PROBES, TINY_ROWS, Probe, cold_probe, panel
from paretorch.ir.protocols import Executable, Runtime

DTYPES = ("f32", "bf16")
CHEAP_COMPILE_S = 0.05  # a runtime that compiles a probe in less gets a graph for each
LARGEST_COLD_BYTES = 48e6  # a larger cache is not overflowed by calibration: weights are then taken to stay in it


@dataclass
class Panel:
    """A compiled graph of probes. idle: inputs with which no probe does anything; widen: inputs are f32 whatever the dtype."""

    runtime: str
    dtype: str
    probes: tuple[Probe, ...]
    nodes: int
    execute: Executable
    idle: tuple[Tensor, ...]
    widen: bool
    place: str

    def call(self, probe: Probe | None, rows: int) -> Callable[[], Any]:
        """A call in which this probe has so many rows, and the others are idle."""
        inputs = list(self.idle)
        if probe is not None:
            inputs[self.probes.index(probe)] = probe.input(rows, "f32" if self.widen else self.dtype, self.place)
        return lambda: self.execute(*inputs)


def cache_bytes() -> float:
    """What this machine's largest cache holds."""
    return shared_cache_bytes() or LARGEST_COLD_BYTES


def compile_panels(name: str, runtime: Runtime, thorough: bool, place: str, problems: dict[str, str]) -> list[Panel]:
    """The compiled graphs of one runtime, of each dtype that it takes; problems gets the reasons for what it does not take."""
    chosen = tuple(probe for probe in PROBES if thorough or probe.quick) + (GPU_PROBES if place == "cuda" else ())
    found, took = [], []
    for probe in DISPATCH:
        began = time.perf_counter()
        found.append(_compile(name, runtime, (probe,), "f32", place, problems, TINY_ROWS))
        took.append(time.perf_counter() - began)
    is_cheap = min(took) < CHEAP_COMPILE_S
    for dtype in DTYPES:
        probes = chosen if dtype == "f32" else tuple(probe for probe in chosen if probe.half)
        if dtype == "f32" and place == "cpu" and cache_bytes() <= LARGEST_COLD_BYTES:
            probes = (*probes, cold_probe(cache_bytes(), dtype))
        for group in [(probe,) for probe in probes] if is_cheap else [probes]:
            found += _compile_or_halve(name, runtime, group, dtype, place, problems, TINY_ROWS if is_cheap else None)
    return [made for made in found if made is not None]


def _compile_or_halve(
    name: str, runtime: Runtime, probes: tuple[Probe, ...], dtype: str, place: str, problems: dict[str, str], rows: int | None
) -> list[Panel | None]:
    """One panel, or several if a probe among them cannot be compiled: that one is then left out, with its reason."""
    refusal = runtime.refuses(panel(probes[:1], dtype, dtype != "f32", TINY_ROWS))
    if refusal is not None:
        problems[f"{name} {dtype}"] = refusal
        return []
    made = _compile(name, runtime, probes, dtype, place, problems, rows)
    if made is not None or len(probes) == 1:
        return [made]
    middle = len(probes) // 2
    halves = probes[:middle], probes[middle:]
    return [part for half in halves for part in _compile_or_halve(name, runtime, half, dtype, place, problems, rows)]


def _compile(
    name: str, runtime: Runtime, probes: tuple[Probe, ...], dtype: str, place: str, problems: dict[str, str], rows: int | None = None
) -> Panel | None:
    """A panel; None if the runtime takes no such graph, in its own dtype or widened to f32 at inputs and outputs.

    rows: of the graph's types; None for symbols, which a runtime that runs the graph as it stands does not need.
    """
    for widen in (False, True) if dtype != "f32" else (False,):
        given = "f32" if widen else dtype
        with torch.device(place):
            graph = panel(probes, dtype, widen, rows)
        refusal = runtime.refuses(graph)
        if refusal is not None:
            problems[f"{name} {dtype}"] = refusal
            continue
        examples = tuple(probe.input(rows or 2 + i, given, place) for i, probe in enumerate(probes))
        try:
            execute = runtime.compile(graph, examples)
            idle = tuple(probe.input(TINY_ROWS if probe in DISPATCH else probe.idle_rows, given, place) for probe in probes)
            execute(*idle)
        except Exception as error:  # runtimes raise many kinds; the calibration says which dtype has no rates of its own, and why
            key = f"{name} {dtype}" + (f" {probes[0].name}" if len(probes) == 1 else "")
            problems[key] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            continue
        problems.pop(f"{name} {dtype}", None)
        return Panel(name, dtype, probes, len(graph.calls), execute, idle, widen, place)
    return None
