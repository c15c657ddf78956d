"""Lowering contenders and racing them: what the plan chooses by prediction, the clock confirms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paretorch.cost_model.measure import race
from paretorch.ir.errors import LoweringError, ParetorchError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Measurement, Runtime

ROUNDS = 12
RACE_SECONDS = 12.0  # after which no new round begins
CLOSE = 3.0  # runtimes predicted within this factor of the best are compiled and raced
CLOSE_TO_COMPILE = 1.15  # the same for runtimes whose compilation takes long, of the best one measured
SLOW_TO_COMPILE = ("inductor",)
LOSES = 1.3  # contenders this many times slower than the best run no further than the heats

# Relative error (norm of the difference over norm) that rounding may make between two forms of the same function.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Contender:
    """A lowered graph that may be handed out. variant: which graph it is; predicted: seconds."""

    variant: str
    runtime: str
    graph: Graph
    execute: Executable
    predicted: float

    @property
    def label(self) -> str:
        return f"{self.variant} on {self.runtime}"


@dataclass
class Lowering:
    """Compiles graphs on runtimes, once each, and keeps the reasons of those that failed.

    form: (graph, runtime) -> the graph as that runtime reads it.
    """

    runtimes: dict[str, Runtime]
    example: tuple[Tensor, ...]
    failures: dict[str, str] = field(default_factory=dict)
    form: Callable[[Graph, str], Graph] = lambda graph, runtime: graph
    _done: dict[tuple[int, str], tuple[Graph, Executable]] = field(default_factory=dict)

    def compile(self, graph: Graph, runtime: str) -> Executable | None:
        """None if the runtime cannot take this graph; the reason is kept in `failures`."""
        key = (id(graph), runtime)
        if key not in self._done:
            refusal = self.runtimes[runtime].refuses(graph)
            if refusal is not None:
                self.failures[runtime] = refusal
                return None
            try:
                with torch.no_grad():
                    execute = _guarded(runtime, self.runtimes[runtime].compile(graph, self.example))
                    execute(*self.example)  # some runtimes refuse an op only when they run it
                self._done[key] = (graph, execute)
            except ParetorchError as error:  # reported: the runtime is left out, the others go on
                self.failures[runtime] = str(error)
                return None
        return self._done[key][1]

    def keep_only(self, kept: Iterable[Contender]) -> None:
        """Drop what lost: each compiled form holds a copy of the weights."""
        executes = {id(contender.execute) for contender in kept}
        self._done = {key: value for key, value in self._done.items() if id(value[1]) in executes}


def _guarded(runtime: str, execute: Executable) -> Executable:
    """The same callable; what a runtime raises while running becomes a LoweringError with its first line."""

    def run(*inputs: Tensor) -> tuple[Any, ...]:
        try:
            return execute(*inputs)
        except Exception as error:  # each runtime raises kinds of its own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
            raise LoweringError(f"{runtime} failed while running: {lines[-1][:200]}") from error

    return run


def contenders(lowering: Lowering, variants: dict[str, Graph], predicted: dict[tuple[str, str], float]) -> list[Contender]:
    """Compile what is predicted to be close to the best, but for what takes long to compile. predicted: seconds by (variant, runtime)."""
    quick = {key: seconds for key, seconds in predicted.items() if key[1] not in SLOW_TO_COMPILE} or predicted
    best = min(quick.values(), default=0.0)
    return _compiled(lowering, variants, {key: seconds for key, seconds in quick.items() if seconds <= CLOSE * best})


def late_contenders(
    lowering: Lowering, variants: dict[str, Graph], predicted: dict[tuple[str, str], float], best: float
) -> list[Contender]:
    """Compile what takes long only where it is predicted to come close to the best seconds that were measured: its most promising variant."""
    slow = {key: seconds for key, seconds in predicted.items() if key[1] in SLOW_TO_COMPILE and seconds <= CLOSE_TO_COMPILE * best}
    first = {runtime: min((seconds, variant) for (variant, name), seconds in slow.items() if name == runtime) for _, runtime in slow}
    return _compiled(lowering, variants, {(variant, runtime): seconds for runtime, (seconds, variant) in first.items()})


def _compiled(lowering: Lowering, variants: dict[str, Graph], predicted: dict[tuple[str, str], float]) -> list[Contender]:
    entered = []
    for (variant, runtime), seconds in sorted(predicted.items(), key=lambda item: (item[1], item[0])):
        graph = lowering.form(variants[variant], runtime)
        execute = lowering.compile(graph, runtime)
        if execute is not None:
            entered.append(Contender(variant, runtime, graph, execute, seconds))
    return entered


def disagreement(expected: Sequence[Any], found: Sequence[Any]) -> str | None:
    """None if the outputs are the same up to rounding; otherwise a sentence with the relative error."""
    if len(expected) != len(found):
        return f"it returns {len(found)} values; the original returns {len(expected)}"
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return f"output {number} has shape {list(b.shape)}; the original's has {list(a.shape)}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b.to(a.dtype)):
                return f"output {number}, {a.dtype}, differs from the original's"
            continue
        error, limit = relative_error(a, b), TOLERANCE.get(a.dtype, 1e-4)
        if not error <= limit:
            return f"output {number} differs from the original's by {error:.2g} (relative); {limit:.0e} is allowed for {a.dtype}"
    return None


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over the norm, over the entries that are finite in the original; inf where finiteness differs."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    a, b = expected[finite].double(), found[finite].double()
    scale = float(a.norm())
    return float((a - b).norm()) / scale if scale else float((a - b).norm())


def run_race(
    entered: Iterable[Contender], example: tuple[Tensor, ...], original: Executable | None, seed: int, rounds: int = ROUNDS
) -> dict[str, Measurement]:
    """Time all contenders and the original side by side, by label; the original is "original"."""
    calls: dict[str, Any] = {c.label: (lambda c=c: c.execute(*example)) for c in entered}
    if original is not None:
        calls["original"] = lambda: original(*example)
    with torch.no_grad():
        return race(calls, rounds=rounds, seed=seed, time_limit=RACE_SECONDS, lose=LOSES, keep=["original"])
