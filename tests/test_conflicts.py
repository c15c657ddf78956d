"""Pairs of choices that exclude each other: declared, learned, and never tried."""

import pytest

from paretorch.conflicts import Conflicts
from paretorch.plan import Choice
from paretorch.problem import Problem
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import sites_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import MODEL, Site
from paretorch.search import search
from paretorch.stages import Stages
from tests.test_search import candidate


def on_two_layers() -> Conflicts:
    return Conflicts(transformer(Sizes(2, 41)), RULES)


def test_a_window_behind_a_merge_reads_positions_that_are_gone():
    conflicts = on_two_layers()
    merge = Choice("tome", "attention", 4)
    first, second = Choice("sliding_window", "attention", 16), Choice("sliding_window", "attention_1", 16)
    assert conflicts.between(merge, second) == (
        "in conflict with tome at attention = 4: it changes the positions that sliding_window reads downstream of it"
    )
    assert conflicts.between(merge, first) is None  # the merge comes after the attention that it is named by
    assert conflicts.first((merge, first, second)) == (second, conflicts.between(merge, second))


def test_merges_follow_merges():
    assert on_two_layers().between(Choice("tome", "attention", 4), Choice("tome", "attention_1", 4)) is None


def test_what_failed_once_is_known():
    conflicts = on_two_layers()
    block, half = Choice("skip_block", "add_1", 1), Choice("skip_attention", "add", 1)
    assert conflicts.first((block, half)) is None
    sentence = conflicts.learn(block, half, "no block ends there")
    assert sentence == "in conflict with skip_block at add_1 = 1: no block ends there"
    assert conflicts.first((block, half)) == (half, sentence)


def test_a_known_conflict_is_never_applied():
    applied, records = [], []

    def apply(choices):
        applied.append({choice.rule for choice in choices})
        return tuple(sorted(choices, key=str))

    def conflict(choices):
        last = next((choice for choice in choices if choice.rule == "b"), None)
        return (last, "in conflict with a") if last is not None and any(choice.rule == "a" for choice in choices) else None

    search(
        Problem(
            candidates=[candidate("a", "x", 1), candidate("b", "y", 1)],
            apply=apply,
            price=lambda graph: (1.0 - 0.1 * len(graph), "eager"),
            drifts=lambda choices, samples: [0.001 for _ in choices],
            loss=lambda choices, graph: (0.001 * len(choices), 0.0, 100),
            limit=1.0,
            max_evaluations=20,
            stages=Stages(None, None),
            record=lambda *entry: records.append(entry),
            conflict=conflict,
        )
    )
    assert {"a"} in applied and {"b"} in applied and {"a", "b"} not in applied  # noqa: PT018
    assert any(entry[0] == "in conflict" and entry[2] == "in conflict with a" for entry in records)


def test_a_site_is_known_by_its_nodes():
    assert Site("add_1+add_2").parts == ("add_1", "add_2")  # blocks that go together
    assert Site("add->add_1").parts == ("add", "add_1")  # a block between two values of the stream
    assert Site("linear..conv2d").parts == ("linear", "conv2d")  # a region that is no block
    assert Site("attention_3").parts == ("attention_3",)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_parts_of_sites_are_nodes(rule):
    graph = rule.example()
    sites, _ = sites_of(rule, graph)
    assert sites
    assert all(graph.node(part) is not None for site in sites for part in site.parts if part != MODEL)
