"""torch.compile(backend="paretorch") beside torch.compile (inductor), on every workload: parity, graphs, recompiles, seconds of a call.

    python benchmarks/compile_backend.py all         # writes benchmarks/results/compile_backend.json and .md
    python benchmarks/compile_backend.py minilm

Both without freezing, in one shuffled race with eager and a second inductor as the A/A row.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch._dynamo.utils import counters

from benchmarks.fetch import missing
from benchmarks.peers import Call, eager, own_code
from benchmarks.run import RESULTS, environment
from benchmarks.workloads import NAMES, workload
from benchmarks.workloads.base import Case
from paretorch import backend
from paretorch.contest import relative_error
from paretorch.cost_model.measure import race, ratio

ROUNDS = 12
BACKENDS = ("inductor", "paretorch")


def compiled(case: Case, name: str) -> tuple[Call, dict[str, Any]]:
    """A call of the model compiled by this backend, and what compiling took. The second call shows whether it compiles again."""
    counters.clear()
    backend.LAST_NOTES.clear()
    model = torch.compile(own_code(case.model, name), backend=name)

    def call() -> Any:
        with torch.no_grad():
            return model(*case.inputs)

    began = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - began
    graphs = counters["stats"]["unique_graphs"]
    call()
    with torch.no_grad():
        expected = case.model(*case.inputs)
    errors = [relative_error(a, b) for a, b in zip(_leaves(expected), _leaves(found), strict=True)]
    return call, {
        "seconds to compile": seconds, "graphs": graphs, "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "relative error": max(errors), "notes": list(backend.LAST_NOTES) if name == "paretorch" else [],
    }  # fmt: skip


def _leaves(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case: both backends compiled in turn, then raced."""
    torch._dynamo.reset()
    made = {name: compiled(case, name) for name in BACKENDS}
    calls, about = {name: call for name, (call, _) in made.items()}, {name: found for name, (_, found) in made.items()}
    calls["inductor again"] = calls["inductor"]
    calls["eager"] = eager(case.model, case.inputs)
    measured = race(calls, rounds=rounds, seed=0)
    against, noise = ratio(measured["inductor"], measured["paretorch"]), ratio(measured["inductor"], measured["inductor again"])
    return {
        "case": case.name, "backends": about, "milliseconds": {name: found.seconds * 1e3 for name, found in measured.items()},
        "times inductor": against.value, "interval": [against.low, against.high], "A/A": noise.value, "rounds": rounds,
    }  # fmt: skip


def markdown(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        '# torch.compile(backend="paretorch") beside inductor', "",
        "Times faster: medians of inductor over ours, from one race, with a 95 % bootstrap interval.", "",
        "| case | inductor ms | ours ms | times faster | interval | A/A | graphs | recompiles | error |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in results:
        ours, theirs = row["backends"]["paretorch"], row["backends"]["inductor"]
        lines.append(
            f"| {row['case']} | {row['milliseconds']['inductor']:.2f} | {row['milliseconds']['paretorch']:.2f} | {row['times inductor']:.2f} "
            f"| {row['interval'][0]:.2f} to {row['interval'][1]:.2f} | {row['A/A']:.2f} | {ours['graphs']} ({theirs['graphs']}) "
            f"| {ours['recompiles']} ({theirs['recompiles']}) | {ours['relative error']:.1e} |"
        )
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    return "\n".join([*lines, "", f"In brackets: inductor's. {about['cpu']}, {about['threads']} threads, {versions}, {about['date']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help=f"all, or of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    path = RESULTS / "compile_backend.json"
    RESULTS.mkdir(exist_ok=True)
    for name in NAMES if args.names == ["all"] else args.names:
        if missing(name):
            print(f"{name}: not measured; fetch it first: python benchmarks/fetch.py {name}")
            continue
        kept = json.loads(path.read_text())["cases"] if path.exists() else []
        found = []
        for case in workload(name).cases():
            found.append(measure(case, args.rounds))
            print(json.dumps(found[-1], indent=1))
            gc.collect()
        names = {row["case"] for row in found}
        rows = [*(row for row in kept if row["case"] not in names), *found]
        path.write_text(json.dumps({"cases": rows, **environment()}, indent=1, sort_keys=True) + "\n")
        path.with_suffix(".md").write_text(markdown(rows, environment()))


if __name__ == "__main__":
    main()
