"""What fewer tokens are worth: a ViT-S/16 with 13 tokens fewer after each of its 12 layers against itself, on each runtime at f32.

    python benchmarks/token_speed.py                 # writes benchmarks/results/token_speed.json and .md

Random weights: this is about speed alone. Both sides run on the same runtime and in one race, with an A/A row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.prediction_models import Vision
from benchmarks.run import RESULTS, environment
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.devices import Target
from paretorch.cost_model.measure import AGAIN, again, race, ratio
from paretorch.cost_model.price import Prices
from paretorch.ir.analyze import analyze
from paretorch.ir.graph import Graph
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_choice, propose
from paretorch.rewrites.normalize import normalize

BATCH, WIDTH, HEADS, DEPTH, TOKENS = 4, 384, 6, 12, 197
FEWER = 13
MEASURED = ("tome", "evit")
NAMES = ("eager", "onnxruntime", "openvino")
ROUNDS = 25
PLAIN = "unmerged"
GOALS = {("tome", "onnxruntime"): 1.40, ("tome", "eager"): 1.35}


def plans(names: Sequence[str]) -> tuple[dict[str, Graph], tuple[torch.Tensor, ...]]:
    """(the unmerged graph and the graph of each rule that makes tokens fewer, inputs)."""
    torch.manual_seed(0)
    program = capture(Vision(WIDTH, HEADS, DEPTH).eval(), (torch.randn(BATCH, 3, 224, 224),))
    graph = normalize(program.graph)
    found = {PLAIN: graph}
    facts = analyze(graph)
    for rule in (rule for rule in RULES if rule.name in names):
        after, places = graph, {candidate.site.name for candidate in propose(graph, facts, [rule])[0]}
        for site in (node.name for node in graph.nodes if node.name in places):
            after = apply_choice(rule, after, site, FEWER if all(isinstance(v, int) for v in rule.knobs) else (FEWER + 0.1) / (TOKENS - 1))
        found[rule.name] = after
    return found, program.example


def measure(rounds: int, names: Sequence[str]) -> list[dict[str, Any]]:
    graphs, inputs = plans(names)
    target = Target.parse("cpu")
    prices = Prices(calibrate({name: RUNTIMES[name] for name in NAMES if RUNTIMES[name].refuses() is None}), target.device)
    rows = []
    for name in (name for name in NAMES if RUNTIMES[name].refuses() is None):
        runs = {plan: RUNTIMES[name].compile(graph, inputs) for plan, graph in graphs.items()}
        seconds = race(again({plan: (lambda run=run: run(*inputs)) for plan, run in runs.items()}, PLAIN), rounds)
        for plan, found in seconds.items():
            times = ratio(seconds[PLAIN], found)
            row = {
                "runtime": name,
                "plan": plan,
                "milliseconds": found.seconds * 1e3,
                "times": times.value,
                "interval": [times.low, times.high],
            }
            if plan in graphs and plan != PLAIN:
                row["predicted"] = prices.graph_cost(graphs[PLAIN], name).seconds / prices.graph_cost(graphs[plan], name).seconds
                row["goal"] = GOALS.get((plan, name))
            rows.append(row)
            print(row, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    about = environment()
    lines = [
        f"# {FEWER} tokens fewer after each layer of a ViT-S/16", "",
        f"{WIDTH} wide, {DEPTH} layers, {TOKENS} tokens, batch {BATCH}, f32, random weights; the same runtime on both sides, one race each.",
        f"{about['cpu']}, {about['threads']} threads, {about['date']}.", "",
        "| runtime | plan | ms | times faster | predicted | goal |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        predicted = f"{row['predicted']:.2f} ({row['predicted'] / row['times'] - 1:+.0%})" if "predicted" in row else ""
        goal = f"{row['goal']:.2f}, {'met' if row['times'] >= row['goal'] else 'not met'}" if row.get("goal") else ""
        label = row["plan"].replace(AGAIN, " again (A/A)")
        interval = f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"
        lines.append(f"| {row['runtime']} | {label} | {row['milliseconds']:.1f} | {row['times']:.2f} ({interval}) | {predicted} | {goal} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rules", nargs="*", default=list(MEASURED), choices=[r.name for r in RULES if r.family == "token_merging"])
    args = parser.parse_args()
    rows = measure(args.rounds, args.rules)
    print(markdown(rows))
    if args.rounds == ROUNDS:
        (RESULTS / "token_speed.json").write_text(json.dumps({"rows": rows, **environment()}, indent=1) + "\n")
        (RESULTS / "token_speed.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
