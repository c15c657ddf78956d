"""Whether budgets are kept: searches with different seeds and splits, each plan's drop on a third set that no search ever saw.

    python benchmarks/budgets_kept.py                # writes benchmarks/results/budgets_kept.json and .md
    python benchmarks/budgets_kept.py --seeds 1 --models demo

Each seed draws which images or sentences `optimize` gets (which it splits into a ranking and a held-out part) and which it never sees. A budget is
kept if the paired drop on the third set is at most the budget plus the half width that the report states.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import paretorch
from benchmarks.run import RESULTS, environment
from paretorch import Budget
from paretorch.cost_model.quality import paired_drop
from paretorch.metrics import top1

SEEDS = 10  # of each model
THIRD = 2_000  # samples that the search never sees
MAX_DROP = 0.01
SEARCH_SECONDS = 120.0

Samples = tuple[tuple[Tensor, ...], Tensor]  # inputs and labels of all samples


def demo() -> tuple[nn.Module, Samples, int]:
    """The vision transformer that ships with the package, Fashion-MNIST test images, batch."""
    from paretorch.demo.run import test_images, trained_model

    images, labels = test_images()
    return trained_model(), ((images,), labels), 16


def minilm() -> tuple[nn.Module, Samples, int]:
    """MiniLM with its sentiment probe, sentences that the probe was not fitted on, batch."""
    from benchmarks.workloads import minilm as workload

    texts, labels = workload.sentences()
    rest = slice(workload.TRAINING_SENTENCES, workload.TRAINING_SENTENCES + 6_000)
    ids, mask = workload.encode(texts[rest])
    return workload.classifier(), ((ids, mask), labels[rest]), workload.BATCH


MODELS: dict[str, Callable[[], tuple[nn.Module, Samples, int]]] = {"demo": demo, "minilm": minilm}


def batches(samples: Samples, chosen: Tensor, size: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Whole batches of the chosen samples."""
    inputs, labels = samples
    parts = chosen[: len(chosen) // size * size].split(size)
    return [(tuple(x[part] for x in inputs), labels[part]) for part in parts]


def trial(name: str, model: nn.Module, samples: Samples, size: int, seed: int) -> dict[str, Any]:
    """One search and its plan's drop on the third set."""
    order = torch.randperm(len(samples[1]), generator=torch.Generator().manual_seed(seed))
    third, seen = batches(samples, order[:THIRD], size), batches(samples, order[THIRD:], size)
    budget = Budget(metric=top1, max_drop=MAX_DROP)
    found = paretorch.optimize(model, seen[0][0], budget=budget, data=seen, seed=seed, time_limit=SEARCH_SECONDS)
    before, after = [], []
    with torch.no_grad():
        for inputs, labels in third:
            before.append(top1(model(*inputs), labels))
            after.append(top1(found(*inputs), labels))
    drop = paired_drop(torch.cat(before), torch.cat(after))
    stated = found.report.half_width or 0.0
    return {
        "model": name, "seed": seed, "stated": found.report.loss or 0.0, "half width": stated, "third": drop.mean, "third half width": drop.half_width,
        "n": drop.n, "speed-up": found.report.speedup, "choices": len(found.plan), "kept": drop.mean <= MAX_DROP + stated,
    }  # fmt: skip


def markdown(table: list[dict[str, Any]]) -> str:
    about, kept = environment(), sum(row["kept"] for row in table)
    lines = [
        f"# Budgets kept: {kept} of {len(table)}", "",
        f"Budget {100 * MAX_DROP:g} point of top-1; drops in points, paired, with half widths of 95 % intervals; third: {THIRD:,} samples that the",
        f"search never saw. {about['cpu']}, {about['date']}.", "",
        "| model | seed | times faster | stated drop | drop on the third set | kept |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['model']} | {r['seed']} | {r['speed-up']:.2f} | {100 * r['stated']:.2f} ± {100 * r['half width']:.2f} "
        f"| {100 * r['third']:.2f} ± {100 * r['third half width']:.2f} | {'yes' if r['kept'] else 'no'} |"
        for r in table
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    table = []
    for name in args.models:
        model, samples, size = MODELS[name]()
        for seed in range(args.seeds):
            table.append(trial(name, model, samples, size, seed))
            print(json.dumps(table[-1]), flush=True)
            if args.seeds == SEEDS:
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / "budgets_kept.json").write_text(json.dumps({"rows": table, **environment()}, indent=1) + "\n")
                (RESULTS / "budgets_kept.md").write_text(markdown(table))


if __name__ == "__main__":
    main()
