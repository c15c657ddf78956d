"""Timing callables side by side, so that the figures can be compared.

Each round runs all contenders in a new order, each once untimed (it warms caches, and pays for whatever the one before left behind) and once
timed. All contenders must use the same number of threads and none may spin while it waits: identical calls beside a spinning one differed by
1.14 to 1.21 times. Ratios are of medians, with a bootstrap interval over rounds; what is smaller than the spread of an A/A row is no difference.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy
import torch

from paretorch.ir.protocols import Measurement

ROUNDS = 20
MIN_ROUNDS = 10
HEATS = 3  # rounds that all contenders run
RESAMPLES = 1000
CLEARED_BYTES = 2**29  # beyond any cache; takes 0.1 ms and more, in which the host launches a few kernels
AGAIN = " again"


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def race(
    contenders: dict[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    *,
    seed: int = 0,
    min_rounds: int = MIN_ROUNDS,
    tight: float | None = None,
    time_limit: float | None = None,
    lose: float | None = None,
    keep: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
    timing: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Measurement]:
    """Seconds of each contender, by name, from the same rounds.

    tight: stop after min_rounds once the interval of each ratio to the first contender is at most this wide (0.02: two percent of the
    ratio). time_limit: seconds after the first three rounds, the heats, from which on no further round begins.
    lose: after three rounds, contenders whose median is more than this many times the best one's run no further, but for those in keep.
    timing: the seconds of one call, after an untimed one; None for the clock's.
    """
    shuffle, names = random.Random(seed), list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    began = clock()
    for done in range(rounds):
        if done == HEATS:
            began = clock()
        if done > HEATS and time_limit is not None and clock() - began >= time_limit:
            break
        if done == HEATS and lose is not None:
            best = min(median(samples[name]) for name in names)
            names = [name for name in names if name in keep or median(samples[name]) <= lose * best]
        if tight is not None and done >= min_rounds and _is_tight(samples, tight):
            break
        shuffle.shuffle(names)
        for name in names:
            samples[name].append(timing(contenders[name]) if timing is not None else timed(contenders[name], clock))
    return {name: measurement(name, samples[name]) for name in contenders}


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the second of two calls."""
    call()
    _wait()
    start = clock()
    call()
    _wait()
    return clock() - start


def device_timing() -> Callable[[Callable[[], Any]], float]:
    """For `race`: seconds on the CUDA device alone, with a cold cache. While the device clears it, the host launches what is timed, and so is not."""
    cleared = torch.empty(CLEARED_BYTES, dtype=torch.int8, device="cuda")

    def seconds(call: Callable[[], Any]) -> float:
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cleared.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return seconds


def burst(call: Callable[[], Any], seconds: float, most: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of some calls in a row, after an untimed one: at least one, until so many seconds have passed, at most `most`."""
    samples = [timed(call, clock)]
    while len(samples) < most and sum(samples) < seconds:
        start = clock()
        call()
        _wait()
        samples.append(clock() - start)
    return samples


def _wait() -> None:
    """Let a GPU finish, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measurement(name: str, samples: Sequence[float]) -> Measurement:
    """Median, spread and samples as one value."""
    middle = median(samples) if samples else float("nan")
    spread = float(numpy.subtract(*numpy.percentile(samples, [75, 25]))) / middle if samples and middle > 0 else 0.0
    return Measurement(name, middle, spread, len(samples), tuple(samples))


def again(contenders: dict[str, Callable[[], Any]], name: str) -> dict[str, Callable[[], Any]]:
    """The contenders and `name` a second time, as the A/A row."""
    return {**contenders, name + AGAIN: contenders[name]}


def ratio(a: Measurement, b: Measurement, *, seed: int = 0) -> Ratio:
    """Median seconds of a over those of b: how many times faster b is. Rounds are resampled together where both ran in the same race."""
    one, other = numpy.asarray(a.samples), numpy.asarray(b.samples)
    if len(one) == 0 or len(other) == 0:
        value = a.seconds / b.seconds
        return Ratio(value, value, value)
    draws = numpy.random.default_rng(seed)
    places = draws.integers(len(one), size=(RESAMPLES, len(one)))
    others = places if len(one) == len(other) else draws.integers(len(other), size=(RESAMPLES, len(other)))
    ratios = numpy.median(one[places], axis=1) / numpy.median(other[others], axis=1)
    low, high = numpy.percentile(ratios, [2.5, 97.5])
    return Ratio(float(numpy.median(one) / numpy.median(other)), float(low), float(high))


def _is_tight(samples: dict[str, list[float]], width: float) -> bool:
    first, *others = (measurement(name, found) for name, found in samples.items())
    ratios = [ratio(first, other) for other in others] or [ratio(first, first)]
    return all(found.high - found.low <= width * found.value for found in ratios)
