"""Measure a workload: paretorch beside all peers in one shuffled race, outputs compared, results written to benchmarks/results/.

    python benchmarks/run.py dinov2                  # exact plan
    python benchmarks/run.py dinov2 --budget         # the plan within the workload's budget, with its paired drop on held-out data
    python benchmarks/run.py all

As DESIGN says: one untimed call before each timed one, order shuffled each round, an A/A row, equal threads, ONNX Runtime without spinning,
OpenVINO at f32, ratios of medians with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import paretorch
from benchmarks.fetch import missing
from benchmarks.peers import PEERS, eager
from benchmarks.summary import write_summary
from benchmarks.workloads import NAMES, workload
from benchmarks.workloads.base import Case, Task
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.contest import relative_error
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.measure import race, ratio
from paretorch.cost_model.memory import weight_bytes
from paretorch.cost_model.work import work_of
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_rule
from paretorch.rewrites.normalize import normalize

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 20


def measure(case: Case, ours: Any, label: str, rounds: int) -> dict[str, Any]:
    """One race of ours against all peers on a case."""
    torch._dynamo.reset()
    gc.collect()
    calls: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            calls[name] = make(case.model, case.inputs)
        except Exception as error:  # a peer that cannot run the model is a row with its error
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    calls[label] = lambda: ours(*case.inputs)
    calls["eager again"] = eager(case.model, case.inputs)
    measured = race(calls, rounds=rounds, seed=0)
    peers = {name: found for name, found in measured.items() if name in PEERS}
    best = min(peers, key=lambda name: peers[name].seconds)
    rows = {}
    for name, found in measured.items():
        against = ratio(measured["eager"], found)
        rows[name] = {
            "milliseconds": found.seconds * 1e3, "times eager": against.value, "interval": [against.low, against.high], "spread": found.spread
        }  # fmt: skip
    with torch.no_grad():
        expected, found_outputs = case.model(*case.inputs), ours(*case.inputs)
    errors = [relative_error(a, b) for a, b in zip(_leaves(expected), _leaves(found_outputs), strict=True)]
    against_best = ratio(measured[best], measured[label])
    return {
        "case": case.name, "rows": rows, "failed": failed, "best peer": best, "rounds": rounds, "relative error": max(errors),
        "times best peer": against_best.value, "interval": [against_best.low, against_best.high],
    }  # fmt: skip


def _leaves(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def exact(name: str, rounds: int) -> dict[str, Any]:
    """Exact plans of all cases of a workload."""
    results = []
    for case in workload(name).cases():
        began = time.perf_counter()
        result = paretorch.optimize(case.model, case.inputs)
        seconds = time.perf_counter() - began
        print(result.report)
        row = measure(case, result, "paretorch exact", rounds)
        results.append(
            {**row, **_about(result), "seconds to optimize": seconds, "floor ms": floor(case) * 1e3, "errors of exact rules": parity(case)}
        )
    return {"workload": name, "mode": "exact", "cases": results, **environment()}


def floor(case: Case) -> float:
    """Seconds that no exact f32 plan can go below here: its products at the best measured rate, or one pass over its weights."""
    found = calibrate({"eager": RUNTIMES["eager"]})
    rate = max(s.amount / s.seconds for s in found.samples if s.curve == "matrix" and s.dtype == "f32")
    graph = normalize(capture(case.model, case.inputs).graph)
    flops = sum(work.flops for work in map(work_of, graph.calls) if work.is_rated_by_flops)
    return max(flops / rate, weight_bytes(graph) / found.bandwidth_bytes_per_s if weight_bytes(graph) > found.cache_bytes else 0.0)


def parity(case: Case) -> dict[str, float]:
    """Relative error of the graph after normalize and every exact rule, priced out or not: torch at f32 and f64, ONNX Runtime at f32."""
    errors = {}
    for dtype, runtimes in ((torch.float32, ("eager", "onnxruntime")), (torch.float64, ("eager",))):
        model = case.model if dtype is torch.float32 else copy.deepcopy(case.model).to(dtype)
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs)
        with torch.no_grad():
            expected = _leaves(model(*inputs))
        program = capture(model, inputs)
        graph = normalize(program.graph)
        for rule in (rule for rule in RULES if rule.is_exact):
            graph = apply_rule(rule, graph)[0]
        for runtime in runtimes:
            found = _leaves(program.unflatten(RUNTIMES[runtime].compile(graph, program.example)(*program.example)))
            name = f"{runtime} {str(dtype).removeprefix('torch.')}"
            errors[name] = max(relative_error(a, b) for a, b in zip(expected, found, strict=True))
    return errors


def budgeted(name: str, rounds: int, samples: int, time_limit: float) -> dict[str, Any]:
    """The plan within the budget of the workload's task."""
    found = workload(name)
    if found.task is None:
        raise SystemExit(f"{name} has no quality task; known: {', '.join(n for n in NAMES if workload(n).task)}")
    task = found.task(samples)
    budget = paretorch.Budget(metric=task.metric, evaluate=task.evaluate, max_drop=task.max_drop)
    began = time.perf_counter()
    result = paretorch.optimize(task.case.model, task.case.inputs, budget=budget, data=task.data, time_limit=time_limit, progress=True)
    seconds = time.perf_counter() - began
    print(result.report)
    row = measure(task.case, result, "paretorch budgeted", rounds)
    extras = _extras(name, task, result)
    return {
        "workload": name,
        "mode": "budget",
        "cases": [{**row, **_about(result), **extras, "seconds to optimize": seconds}],
        **environment(),
    }


def _extras(name: str, task: Task, result: Any) -> dict[str, Any]:
    """Further quality figures of a workload, for the original and for the plan."""
    extra = {"budget": task.max_drop, "baseline": task.baseline}
    for label, function in workload(name).extras.items():
        extra[label] = {"original": function(task.case.model), "plan": function(result)}
    return extra


def _about(result: Any) -> dict[str, Any]:
    report = result.report
    return {
        "runtime": report.runtime, "plan": list(report.plan_lines), "predicted ms": (report.predicted_seconds or 0) * 1e3,
        "loss": report.loss, "half width": report.half_width, "samples": report.samples, "notes": list(report.notes), "stages": report.stages,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    packages = {}
    for name in ("torch", "onnxruntime", "openvino", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    return {"date": date.today().isoformat(), "cpu": cpu, "threads": torch.get_num_threads(), "versions": packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help=f"all, or of {', '.join(NAMES)}")
    parser.add_argument("--budget", action="store_true", help="measure the budgeted plan instead of the exact one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--samples", type=int, default=5_000, help="samples of the quality task, ranking and held out together")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds of search")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in NAMES if args.names == ["all"] else args.names:
        if missing(name):
            print(f"{name}: not measured; fetch it first: python benchmarks/fetch.py {name}")
            continue
        found = budgeted(name, args.rounds, args.samples, args.time_limit) if args.budget else exact(name, args.rounds)
        (RESULTS / f"{name}_{found['mode']}.json").write_text(json.dumps(found, indent=1, sort_keys=True, default=float) + "\n")
        write_summary(RESULTS)


if __name__ == "__main__":
    main()
