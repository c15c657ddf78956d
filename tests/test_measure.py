"""Races: order, pairing, early stops and intervals, on a clock that the test turns."""

from __future__ import annotations

import random

from paretorch.cost_model.measure import again, measurement, race, ratio
from paretorch.ir.protocols import Measurement


class Clock:
    """Time that passes only while a contender runs."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def contender(self, name, seconds):
        """Takes the next of these seconds at each call, the last again and again."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_each_timed_call_follows_an_untimed_one_in_a_shuffled_order():
    clock = Clock()
    contenders = {name: clock.contender(name, [1.0]) for name in "abc"}
    race(contenders, 6, seed=3, clock=clock)
    assert clock.calls[0::2] == clock.calls[1::2]
    rounds = [tuple(clock.calls[start : start + 6 : 2]) for start in range(0, 36, 6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    again_clock = Clock()
    race({name: again_clock.contender(name, [1.0]) for name in "abc"}, 6, seed=3, clock=again_clock)
    assert again_clock.calls == clock.calls


def test_the_untimed_call_is_not_in_the_figure():
    clock = Clock()
    found = race({"a": clock.contender("a", [50.0, 2.0])}, 4, clock=clock)
    assert found["a"] == Measurement("a", 2.0, 0.0, 4, (2.0, 2.0, 2.0, 2.0))


def test_early_stop_once_intervals_are_tight():
    clock = Clock()
    found = race({"a": clock.contender("a", [1.0]), "b": clock.contender("b", [2.0])}, 100, min_rounds=5, tight=0.02, clock=clock)
    assert found["a"].rounds == 5


def test_no_early_stop_while_rounds_disagree():
    clock, noise = Clock(), random.Random(0)
    noisy = [noise.uniform(1.0, 3.0) for _ in range(200)]
    found = race({"a": clock.contender("a", [1.0]), "b": clock.contender("b", noisy)}, 30, min_rounds=5, tight=0.02, clock=clock)
    assert found["b"].rounds == 30


def test_time_limit_counts_after_the_heats():
    clock = Clock()
    assert race({"a": clock.contender("a", [10.0])}, 50, time_limit=30.0, clock=clock)["a"].rounds == 5
    assert race({"a": clock.contender("a", [10.0])}, 2, time_limit=1.0, clock=clock)["a"].rounds == 2


def test_losers_run_the_heats_only_but_for_those_that_are_kept():
    clock = Clock()
    contenders = {name: clock.contender(name, [seconds]) for name, seconds in (("a", 1.0), ("b", 1.2), ("c", 2.0), ("original", 3.0))}
    found = race(contenders, 10, lose=1.3, keep=["original"], clock=clock)
    assert {name: row.rounds for name, row in found.items()} == {"a": 10, "b": 10, "c": 3, "original": 10}


def test_ratio_of_medians_with_its_interval():
    one, other = measurement("one", [2.0, 2.1, 1.9, 2.0, 2.0]), measurement("other", [1.0, 1.05, 0.95, 1.0, 1.0])
    found = ratio(one, other)
    assert found.value == 2.0
    assert found.low <= found.value <= found.high
    assert found == ratio(one, other)


def test_disturbed_rounds_cancel_because_they_are_resampled_together():
    slow = [1.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 3.0]
    found = ratio(measurement("a", slow), measurement("b", [2 * x for x in slow]))
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


def test_ratio_of_figures_without_samples():
    assert ratio(Measurement("a", 3.0, 0.0, 5), Measurement("b", 2.0, 0.0, 5)).value == 1.5


def test_an_aa_row_runs_the_same_call():
    clock = Clock()
    contenders = again({"a": clock.contender("a", [1.0])}, "a")
    found = race(contenders, 3, clock=clock)
    assert list(found) == ["a", "a again"]
    assert ratio(found["a"], found["a again"]).value == 1.0
