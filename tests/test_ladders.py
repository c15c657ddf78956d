"""Ladders and steps of the search, on made-up moves."""

import random

from paretorch.ladders import LEADS, neighbours, shaped
from paretorch.moves import Move
from paretorch.plan import Choice
from paretorch.problem import Point


def moves_of(rule, places, saved, drift, values=(1, 2, 4)):
    return [
        Move(Choice(rule, f"layer{place}", value), saved(place) * value, drift(place) * value**2, rule)
        for place in range(places)
        for value in values
    ]


MERGES = moves_of("merge", 4, lambda place: 1.0, lambda place: 1.0)


def knobs(choices, rule="merge", places=4):
    found = {choice.site: choice.knob for choice in choices if choice.rule == rule}
    return [found.get(f"layer{place}", 0) for place in range(places)]


def test_an_even_ladder_gives_each_value_to_all_places_before_the_next():
    even, *_ = shaped((), MERGES)
    rungs = [knobs(rung) for rung in even]
    assert len(rungs) == 12
    assert [1, 1, 1, 1] in rungs
    assert [2, 2, 2, 2] in rungs
    assert rungs[-1] == [4, 4, 4, 4]
    assert all(max(rung) <= 1 or min(rung) >= 1 for rung in rungs[:8])


def test_a_lead_gives_the_first_or_the_last_places_more():
    _, falling, rising = (list(map(knobs, ladder)) for ladder in shaped((), MERGES))
    assert LEADS[1] > 0 > LEADS[2]
    assert all(rung == sorted(rung, reverse=True) for rung in falling)
    assert all(rung == sorted(rung) for rung in rising)
    assert [2, 1, 0, 0] in falling


def test_ladders_begin_with_the_start_and_the_best_kin_comes_first():
    start = (Choice("bf16", "model", "bf16"),)
    dear = moves_of("drop", 4, lambda place: 1.0, lambda place: 50.0)
    alone = [Move(Choice("odd", "layer0", 1), 1.0, 0.01, "odd")]
    ladders = shaped(start, [*dear, *MERGES, *alone])
    assert len(ladders) == 2 * len(LEADS)
    assert {choice.rule for choice in ladders[0][-1]} == {"merge", "bf16"}
    assert all(start[0] in rung for ladder in ladders for rung in ladder)


def slot(choice):
    return choice.rule, choice.site


def test_a_swap_takes_drift_from_where_it_buys_little():
    moves = moves_of("merge", 2, lambda place: (4.0, 1.0)[place], lambda place: 1.0)
    best = Point((Choice("merge", "layer0", 1), Choice("merge", "layer1", 2)), 1.0, "eager", 0.0, 0.0, 10)
    found = [knobs(choices, places=2) for choices in neighbours(best, moves, random.Random(0), slot)]
    assert [2, 1] in found, "two more seconds saved for the same drift"
    assert found.index([2, 1]) < found.index([2, 2])
    assert [1, 4] in found
    assert [0, 4] not in found, "it would save nothing"


def test_a_swap_stays_within_a_kin():
    moves = [*MERGES, *moves_of("drop", 4, lambda place: 2.0, lambda place: 1.0)]
    best = Point((Choice("drop", "layer0", 1), Choice("merge", "layer1", 1)), 1.0, "eager", 0.0, 0.0, 10)
    for choices in neighbours(best, moves, random.Random(0), slot):
        assert len({*choices} - {*best.choices}) <= 2
        assert knobs(choices, "drop") != [0, 0, 0, 0] or knobs(choices, "merge") == [0, 1, 0, 0]
