"""Predicted and measured speed-ups of lossy plans: every family, weak and strong, alone and together, on several models and runtimes."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.prediction_models import MODELS
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.measure import race
from paretorch.cost_model.price import Prices
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import ParetorchError
from paretorch.ir.graph import Graph
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import Candidate, apply_choice, propose
from paretorch.rewrites.normalize import normalize

CASES = (("vision of 192", 4), ("encoder of 256", 4), ("prefill", 1), ("speech encoder", 1), ("encoder of 768", 1))
RUNTIME_NAMES = ("eager", "onnxruntime", "openvino")
# Each plan: (rule, share of the rule's sites from the first on, place among its knob values from 0 = weakest to 1 = strongest).
PLANS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "tome, weak": (("tome", 1.0, 0.0),),
    "tome, middle": (("tome", 1.0, 0.4),),
    "tome, strong": (("tome", 1.0, 1.0),),
    "a block of four skipped": (("skip_block", 0.25, 1.0),),
    "half of the blocks skipped": (("skip_block", 0.5, 1.0),),
    "half of the feed-forwards skipped": (("skip_feed_forward", 0.5, 1.0),),
    "half of the attentions skipped": (("skip_attention", 0.5, 1.0),),
    "windows, wide": (("sliding_window", 1.0, 0.0),),
    "windows, narrow": (("sliding_window", 1.0, 1.0),),
    "bf16": (("bf16", 1.0, 1.0),),
    "tome and bf16": (("tome", 1.0, 0.4), ("bf16", 1.0, 1.0)),
    "skips and windows": (("skip_feed_forward", 0.25, 1.0), ("sliding_window", 1.0, 0.5)),
}


def pairs(prices: Prices, rounds: int, cases: tuple[tuple[str, int], ...] = CASES) -> list[dict[str, Any]]:
    """A row for each (model, plan, runtime) that the plan applies to: predicted and measured times faster than without it."""
    table = []
    for name, batch in cases:
        graphs, x = plans_of(name, batch)
        for runtime in RUNTIME_NAMES:
            if RUNTIMES[runtime].refuses() is None:
                table += _rows(f"{name} x {batch}", runtime, graphs, x, prices, rounds)
    return table


def plans_of(name: str, batch: int) -> tuple[dict[str, Graph], torch.Tensor]:
    """Graphs of a model with each plan that applies to it and "plain", and the model's input."""
    torch.manual_seed(0)
    build, make = MODELS[name]
    model, x = build().eval(), make(batch)
    graph = normalize(capture(model, (x,)).graph)
    candidates = propose(graph, analyze(graph), [rule for rule in RULES if not rule.is_exact])[0]
    plans = {label: made for label, parts in PLANS.items() if (made := applied(graph, candidates, parts)) is not None}
    return {"plain": graph, **plans}, x


def repriced_pairs(table: list[dict[str, Any]], prices: Prices) -> list[dict[str, Any]]:
    """The rows of `pairs` as they were measured, with predictions of today's formulas."""
    known = {f"{name} x {batch}": plans_of(name, batch)[0] for name, batch in CASES}

    def seconds(row: dict[str, Any], plan: str) -> float:
        return prices.graph_cost(known[row["model"]][plan], row["runtime"]).seconds

    return [{**row, "predicted": seconds(row, "plain") / seconds(row, row["plan"])} for row in table]


def applied(graph: Graph, candidates: list[Candidate], parts: tuple[tuple[str, float, float], ...]) -> Graph | None:
    """The graph with a plan's parts; None if one of its rules is legal nowhere, or does not go with the others."""
    for rule, share, strength in parts:
        own = [c for c in candidates if c.rule.name == rule and c.knobs and (rule != "bf16" or c.site.name == "model")]
        if not own:
            return None
        for candidate in own[: max(1, round(share * len(own)))]:
            knob = candidate.knobs[round(strength * (len(candidate.knobs) - 1))]
            try:
                graph = apply_choice(candidate.rule, graph, candidate.site.name, knob)
            except ParetorchError:
                if candidate is own[0]:
                    return None
    return graph


def _rows(model: str, runtime: str, graphs: dict[str, Graph], x: torch.Tensor, prices: Prices, rounds: int) -> list[dict[str, Any]]:
    """One race of all plans of a model on one runtime; measured is the median over rounds, since what disturbs a round disturbs both."""
    calls, predicted = {}, {}
    for label, graph in graphs.items():
        if RUNTIMES[runtime].refuses(graph) is not None:
            continue
        try:
            execute = RUNTIMES[runtime].compile(graph, (x,))
        except ParetorchError as error:
            print(f"{model}, {label} on {runtime}: {error}")
            continue
        calls[label] = lambda execute=execute: execute(x)
        predicted[label] = prices.graph_cost(graph, runtime).seconds
    if "plain" not in calls:
        return []
    with torch.no_grad():
        measured = race(calls, rounds, seed=0)
    return [
        {
            "model": model, "runtime": runtime, "plan": label, "predicted": predicted["plain"] / predicted[label],
            "measured": statistics.median(a / b for a, b in zip(measured["plain"].samples, found.samples, strict=True)),
        }
        for label, found in measured.items() if label != "plain"
    ]  # fmt: skip


def rank_correlation(table: list[dict[str, Any]]) -> float:
    """Spearman's, of predicted and measured speed-ups."""
    from scipy.stats import spearmanr

    return float(spearmanr([row["predicted"] for row in table], [row["measured"] for row in table]).statistic)
