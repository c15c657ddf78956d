"""DyMU's thresholds: measured on data, offered by a search, and drifts that are told from one place to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import paretorch
from paretorch.capture import capture
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import is_op
from paretorch.moves import measure_moves
from paretorch.plan import Choice, Plan
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import Candidate, calibrated, sites_of
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Knob, Site, level
from paretorch.rewrites.token_merging.dymu import RULE
from paretorch.savings import Pricing, Savings
from tests.test_dymu import READS, C, Reader, T, graph_of, looked_at, taken
from tests.test_search import candidate, with_losses
from tests.zoo import make


def test_a_threshold_is_the_mean_of_the_cut_offs() -> None:
    model, _ = make("bert", T=T, B=4)
    torch.manual_seed(2)
    batches = []
    for real in ([17, 8, 12, 3], [17, 17, 5, 9]):
        batches.append((torch.randint(0, 31, (4, T)), (torch.arange(T) < torch.tensor(real)[:, None]).long()))
    graph = normalize(capture(model.double(), batches[0]).graph)
    found, _ = sites_of(RULE, graph)
    (first, second) = RULE.calibrate(graph, found, batches)  # type: ignore[misc]
    assert [site.name for site in (first, second)] == [site.name for site in found]
    for site, measured in zip(found, (first, second), strict=True):
        assert measured.values is not None
        assert [level(value) for value in measured.values] == [level(value) for value in site.values or ()]
        for value in measured.values[1:]:
            share, threshold = map(float, str(value).split(" above "))
            assert threshold == pytest.approx(cut_off(graph, site, batches, int(share * 16 + 1e-9)), abs=1e-4)
    assert RULE.calibrate(graph, found, batches) == [first, second]  # type: ignore[misc]


def cut_off(graph: Graph, site: Site, batches: Sequence[Sequence[Tensor]], count: int) -> float:
    """By what the match sees where the rule is applied alone."""
    after = taken(graph, (site.name, (site.values or ())[-1]))
    match = next(node for node in after.calls if is_op(node, "match_above"))
    cuts = []
    for inputs in batches:
        metric, size = looked_at(after, lambda g, _: g.node(match.name).args[:2], *inputs)  # type: ignore[union-attr, arg-type, return-value]
        scores = []
        for keys, sizes in zip(F.normalize(metric, dim=-1), size, strict=True):
            real = [place for place in range(2, T, 2) if sizes[place] > 0]
            cosines = [max((float(keys[a] @ keys[b]) for b in real), default=0.0) for a in range(1, T, 2) if sizes[a] > 0]
            scores += cosines + [1.0] * (8 - len(cosines))  # padding goes first
        cuts.append(max(0.0, sorted(scores, reverse=True)[count * 4 - 1]))
    return sum(cuts) / len(cuts)


def test_drifts_at_one_place_tell_of_those_with_other_thresholds() -> None:
    layers = [candidate("dymu", f"layer{n}", *(f"{share} above {0.9 + n / 100}" for share in (0.1, 0.2, 0.4))) for n in range(4)]
    asked = []

    def alone(choice: Any) -> float:
        asked.append(choice)
        return float(1 + int(choice.site[-1])) * level(choice.knob) ** 2  # type: ignore[operator]

    problem = with_losses(layers, alone, len, limit=1.0)
    problem.price = lambda graph: (1.0 - 0.1 * sum(level(choice.knob) for choice in graph), "eager")
    moves = measure_moves(problem, 1.0)
    assert len(asked) == 3 + 3  # all at the first place, the middle one at the others
    assert len({move.kin for move in moves}) == 1
    assert {str(move.choice): move.drift for move in moves}["dymu at layer3 = 0.4 above 0.93"] == pytest.approx(4 * 0.16)


def test_values_of_equal_levels_are_priced_as_one() -> None:
    layers = [Candidate(RULE, Site(f"v{n}"), tuple(f"{s} above {0.9 + n / 100}" for s in (0.1, 0.2, 0.3, 0.4, 0.6))) for n in range(6)]
    asked = []

    def saved(choice: Any) -> float:
        asked.append(choice)
        return float(level(choice.knob)) * (6 - int(choice.site[1:]))  # type: ignore[arg-type]

    savings = Savings(layers, Pricing(lambda _: 0, saved, saved, lambda _: True))
    for number, layer in enumerate(layers):
        found, _ = savings.of(layer)
        assert [knob for knob, _ in found] == list(layer.knobs)
        assert [seconds for _, seconds in found] == pytest.approx([share * (6 - number) for share in (0.1, 0.2, 0.3, 0.4, 0.6)])
    assert len(asked) == 9


def test_only_rules_that_measure_their_values_are_asked() -> None:
    graph, x = graph_of(), torch.randn(3, T, C, dtype=torch.float64)
    rules = rules_named(["tome", "dymu"])
    candidates = [
        Candidate(rule, site, tuple(value for value in site.values or () if value)) for rule in rules for site in sites_of(rule, graph)[0]
    ]
    found = calibrated(candidates, graph, [(x,)])
    assert [(c.rule.name, c.site.name) for c in found] == [(c.rule.name, c.site.name) for c in candidates]
    assert [c for c in found if c.rule.name == "tome"] == [c for c in candidates if c.rule.name == "tome"]
    ours = [c for c in found if c.rule.name == "dymu"]
    assert len({c.knobs for c in ours}) == len(ours) == 3
    after = taken(graph, *((c.site.name, c.knobs[0]) for c in ours))
    assert [shape_of(node)[-2] for node in after.calls if is_op(node, "attention")] == [T, T - 1, T - 2]


def test_a_search_offers_what_its_data_say() -> None:
    torch.manual_seed(3)
    data, model = [torch.randn(4, T, C) for _ in range(6)], Reader(READS["class"], 2).eval()

    def offered() -> list[tuple[str, Knob]]:
        result = paretorch.optimize(
            model, data[0], rules=["dymu"], budget=paretorch.Budget(drift=0.5), data=data, target="cuda:h100", time_limit=0
        )
        return [(entry.site, entry.knob) for entry in result.report.entries if entry.rule == "dymu"]

    found = offered()
    assert {site for site, _ in found} == {"attention", "attention_1"}
    assert all(0.0 < float(str(knob).split(" above ")[1]) != 0.9 for _, knob in found)
    assert offered() == found
    assert Plan.from_json(Plan(tuple(Choice("dymu", *each) for each in found)).to_json()).choices == tuple(
        Choice("dymu", *each) for each in found
    )
