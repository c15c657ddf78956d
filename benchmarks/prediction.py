"""How well predicted seconds agree with measured ones: whole models, three batch sizes, every runtime, at f32 and bf16.

    python benchmarks/prediction.py                   # all models and plans; writes benchmarks/results/prediction.json and .md, docs/prediction.png
    python benchmarks/prediction.py --smoke           # two models, one batch size, few rounds; writes nothing
    python benchmarks/prediction.py --reprice         # measures nothing: prices what was measured again, after a change of a formula

A shared machine runs at another pace in each second. So one block of the calibration runs again in every round of every race, and what a model takes
is counted in blocks of the same round: the median of its seconds over the block's, times the block's seconds when it was calibrated, is what it
would have taken at the pace of the calibration. Errors of the raw seconds stand beside.

Then predicted and measured speed-ups of lossy plans, and the rank correlation between them. The models that are held back (see
prediction_models.py) were named before the first run and are never used to tune a formula.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.prediction_models import HELD_BACK, MODELS
from benchmarks.prediction_plans import CASES, pairs, rank_correlation, repriced_pairs
from benchmarks.run import environment
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.curves import Calibration
from paretorch.cost_model.devices import Target
from paretorch.cost_model.measure import race
from paretorch.cost_model.price import Prices
from paretorch.cost_model.probes import WHOLES, panel
from paretorch.ir.errors import ParetorchError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Measurement
from paretorch.rewrites.normalize import normalize

RESULTS = Path(__file__).resolve().parent / "results"
PLOT = Path(__file__).resolve().parents[1] / "docs" / "prediction.png"
BATCHES = (1, 4, 8)
PLAN_ROUNDS = 15
RACE_SECONDS = 10.0  # after which no new round begins
CONTENDERS = (("eager", "f32"), ("eager", "bf16"), ("onnxruntime", "f32"), ("openvino", "f32"))


def to_half(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return module.to(torch.bfloat16), x.to(torch.bfloat16) if x.is_floating_point() else x


class Reference:
    """One block of the calibration, as eager torch at f32: what tells the machine's pace."""

    def __init__(self, calibration: Calibration) -> None:
        probe, rows = WHOLES[0], WHOLES[0].rows[-1]
        graph, self._x = panel((probe,), "f32", False, rows), probe.input(rows, "f32", "cpu")
        self._execute = RUNTIMES["eager"].compile(graph, (self._x,))
        own = [s for s in calibration.samples if (s.runtime, s.dtype, s.curve) == ("eager", "f32", probe.curve)]
        self.calibrated = max(own, key=lambda sample: sample.amount).seconds

    def __call__(self) -> Any:
        return self._execute(self._x)

    def at_its_pace(self, found: Measurement, own: Measurement) -> float:
        """Seconds that a contender would have taken when this was calibrated. own: this reference's samples of the same rounds."""
        return self.calibrated * statistics.median(a / b for a, b in zip(found.samples, own.samples, strict=True))


def captured(name: str, batch: int, dtype: str) -> tuple[Graph, Tensor]:
    """A model's graph, and its input. Raises ParetorchError."""
    build, make = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), make(batch)
    if dtype == "bf16":
        model, x = to_half(model, x)
    return normalize(capture(model, (x,)).graph), x


def rows(name: str, batch: int, prices: Prices, reference: Reference, rounds: int) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a model on each runtime that takes it, from one race."""
    calls, predicted = {}, {}
    for runtime, dtype in CONTENDERS:
        if RUNTIMES[runtime].refuses() is not None:
            continue
        try:
            graph, x = captured(name, batch, dtype)
            execute = RUNTIMES[runtime].compile(graph, (x,))
        except ParetorchError as error:
            print(f"{name} x {batch} on {runtime} {dtype}: {error}")
            continue
        calls[f"{runtime} {dtype}"] = lambda execute=execute, x=x: execute(x)
        predicted[f"{runtime} {dtype}"] = prices.graph_cost(graph, runtime).seconds
    measured = race({**calls, "reference": reference}, rounds, seed=0, time_limit=RACE_SECONDS)
    own = measured.pop("reference")
    at_its_pace = {key: reference.at_its_pace(found, own) for key, found in measured.items()}
    return [
        {
            "model": name, "batch": batch, "contender": key, "held back": name in HELD_BACK, "predicted_s": predicted[key],
            "measured_s": at_its_pace[key], "raw_s": found.seconds, "spread": found.spread, "rounds": found.rounds,
            "error": predicted[key] / at_its_pace[key] - 1, "raw error": predicted[key] / found.seconds - 1,
        }
        for key, found in measured.items()
    ]  # fmt: skip


def repriced(kept: dict[str, Any], prices: Prices, reference: Reference) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and plans of an earlier run with predictions of today's formulas, from the same samples of the same calibration."""
    if kept["reference_s"] != reference.calibrated:
        sys.exit(
            f"{RESULTS / 'prediction.json'} belongs to another calibration than the one in the cache: measure again, without --reprice"
        )
    table = []
    for row in kept["rows"]:
        runtime, dtype = row["contender"].split()
        predicted = prices.graph_cost(captured(row["model"], row["batch"], dtype)[0], runtime).seconds
        errors = {"error": predicted / row["measured_s"] - 1, "raw error": predicted / row["raw_s"] - 1}
        table.append({**row, "predicted_s": predicted, **errors})
    return table, repriced_pairs(kept["plans"], prices)


def summary(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and 90th percentile of |error|, over all rows, the held-back models, and each contender."""
    promised = [row for row in table if not row["contender"].startswith("openvino")]
    groups = {"all": promised, "held back": [row for row in promised if row["held back"]]}
    groups |= {"all, raw": [{**row, "error": row["raw error"]} for row in promised]}
    groups |= {key: [row for row in table if row["contender"] == key] for key in sorted({row["contender"] for row in table})}
    found = {}
    for name, group in groups.items():
        errors = sorted(abs(row["error"]) for row in group)
        if errors:
            ninth = errors[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)]
            bias = statistics.median(row["error"] for row in group)
            found[name] = {"rows": len(errors), "median": statistics.median(errors), "90th percentile": ninth, "median signed": bias}
    return found


def markdown(
    table: list[dict[str, Any]], plans: list[dict[str, Any]], figures: dict[str, Any], correlation: float, calibration: str
) -> str:
    about = environment()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Predicted and measured seconds of whole models",
        "",
        f"{about['cpu']}, {about['threads']} threads, {versions}, {about['date']}. Errors are predicted / measured - 1.",
        "The machine is shared: measured seconds are counted in runs of one block of the calibration in the same rounds, and so stand for the",
        "pace that it had when it was calibrated; the raw ones stand beside. The models that are held back were never used to tune a formula.",
        '"all" is torch at f32 and bf16 and ONNX Runtime at f32.',
        "",
        "| over | rows | median error | 90th percentile | median signed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {f['rows']} | {f['median']:.1%} | {f['90th percentile']:.1%} | {f['median signed']:+.1%} |"
        for name, f in figures.items()
    ]
    lines += [
        "",
        "| model | batch | contender | predicted ms | measured ms | raw ms | error | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        name = row["model"] + (" (held back)" if row["held back"] else "")
        lines.append(
            f"| {name} | {row['batch']} | {row['contender']} | {row['predicted_s'] * 1e3:.2f} | {row['measured_s'] * 1e3:.2f} "
            f"| {row['raw_s'] * 1e3:.2f} | {row['error']:+.1%} | {row['spread']:.1%} |"
        )
    lines += [
        "", f"## Speed-ups of {len(plans)} (model, plan, runtime) triples: rank correlation {correlation:.3f}", "",
        "| model | runtime | plan | predicted | measured |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r['model']} | {r['runtime']} | {r['plan']} | {r['predicted']:.2f}x | {r['measured']:.2f}x |" for r in plans]
    return "\n".join([*lines, "", "```", calibration, "```", ""])


def plot(table: list[dict[str, Any]], plans: list[dict[str, Any]]) -> None:
    """Predicted against measured: seconds of models, and speed-ups of plans."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    for key in sorted({row["contender"] for row in table}):
        own = [row for row in table if row["contender"] == key]
        left.scatter([r["measured_s"] * 1e3 for r in own], [r["predicted_s"] * 1e3 for r in own], s=14, label=key)
    for key in sorted({row["runtime"] for row in plans}):
        rest = [row for row in plans if row["runtime"] == key]
        right.scatter([r["measured"] for r in rest], [r["predicted"] for r in rest], s=14, label=key)
    for axes, unit in ((left, "ms of a call"), (right, "times faster than without the plan")):
        axes.set(xscale="log", yscale="log", xlabel=f"measured {unit}", ylabel=f"predicted {unit}")
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def told(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in found:
        print(
            f"{row['model']:>16} x {row['batch']} {row['contender']:>15}: {row['predicted_s'] * 1e3:9.3f} ms predicted, "
            f"{row['measured_s'] * 1e3:9.3f} measured ({row['raw_s'] * 1e3:9.3f} raw), {row['error']:+.1%}", flush=True,
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two models, one batch size, few rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--reprice", action="store_true", help="keep what was measured, and predict it anew")
    parser.add_argument("--thorough", action="store_true", help="calibrate thoroughly")
    args = parser.parse_args()
    names, batches, rounds = (["encoder of 128", "separable net"], [1], 5) if args.smoke else (args.models, args.batches, args.rounds)
    usable = {name: RUNTIMES[name] for name, _ in CONTENDERS if RUNTIMES[name].refuses() is None}
    calibration = calibrate(usable, thorough=args.thorough)
    prices = Prices(calibration, Target.parse("cpu").device)
    table, reference = [], Reference(calibration)
    if args.reprice:
        table, plans = repriced(json.loads((RESULTS / "prediction.json").read_text()), prices, reference)
    else:
        for name in names:
            for batch in batches:
                table += told(rows(name, batch, prices, reference, rounds))
        plans = pairs(prices, min(rounds, PLAN_ROUNDS), CASES[:1] if args.smoke else CASES)
    figures, correlation = summary(table), rank_correlation(plans)
    print(json.dumps(figures, indent=1), f"rank correlation over {len(plans)} plans: {correlation:.3f}", sep="\n")
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        found = {"summary": figures, "rank correlation": correlation, "reference_s": reference.calibrated, "rows": table, "plans": plans}
        (RESULTS / "prediction.json").write_text(json.dumps({**found, **environment()}, indent=1) + "\n")
        (RESULTS / "prediction.md").write_text(markdown(table, plans, figures, correlation, str(calibration)))
        plot(table, plans)


if __name__ == "__main__":
    main()
