"""Seconds of each stage of an exact `optimize`, and of planning under a budget, on a ViT-S-sized model of 12 layers and on one of 48.

python benchmarks/compile_time.py                # writes benchmarks/results/compile_time.json and .md
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import paretorch
from benchmarks.prediction_models import Vision
from benchmarks.run import RESULTS, environment
from paretorch.capture import capture
from paretorch.cost_model.devices import Target
from paretorch.exact import apply_exact
from paretorch.ir.analyze import analyze
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import propose
from paretorch.rewrites.normalize import normalize
from paretorch.search import search
from paretorch.session import open_session
from paretorch.stages import Stages

DEPTHS = (12, 48)
WIDTH, HEADS, BATCH = 384, 6, 1


def measure(depth: int) -> dict[str, float]:
    """Seconds by stage. Calibration is read from its cache: a model of one layer was optimized before."""
    torch.manual_seed(0)
    model, images = Vision(WIDTH, HEADS, depth).eval(), torch.randn(BATCH, 3, 224, 224)
    began = time.perf_counter()
    stages = dict(paretorch.optimize(model, images).report.stages)
    return {**stages, "whole": time.perf_counter() - began}


def planning(depth: int) -> dict[str, float]:
    """Seconds of what a search does beside running models: analyze, propose, price every candidate, and select, with losses made up."""
    torch.manual_seed(0)
    model, images = Vision(WIDTH, HEADS, depth).eval(), torch.randn(BATCH, 3, 224, 224)
    program, stages = capture(model, (images,)), Stages(None, None)
    budget, data = paretorch.Budget(drift=0.05), [images, images + 1]
    session = open_session(program, normalize(program.graph), Target.parse("cpu"), budget, data, stages, RULES, 0, None)
    apply_exact(session)
    seconds, began = {}, time.perf_counter()
    facts = analyze(session.exact)
    seconds["analyze"] = time.perf_counter() - began
    candidates = propose(session.exact, facts, session.lossy)[0]
    seconds["propose"] = time.perf_counter() - began - seconds["analyze"]
    made_up = replace(
        session.problem(candidates),
        drifts=lambda choices, samples: [0.001 * (1 + place) for place in range(len(choices))],
        loss=lambda choices, graph: (0.001 * len(choices), 0.0, 1),
        max_evaluations=1,
    )
    search(made_up)
    seconds["price and select"] = time.perf_counter() - began - sum(seconds.values())
    return {**seconds, "whole": time.perf_counter() - began}


def markdown(found: dict[str, dict[str, dict[str, float]]], about: dict[str, Any]) -> str:
    lines = [f"# Seconds of `optimize`: ViT-S, {BATCH} x 3 x 224 x 224"]
    for title, times in found.items():
        shallow, deep = (times[str(depth)] for depth in DEPTHS)
        lines += ["", f"## {title}", "", "| stage | 12 layers | 48 layers | ratio |", "|---|---|---|---|"]
        lines += [f"| {name} | {shallow[name]:.2f} | {deep[name]:.2f} | {deep[name] / max(shallow[name], 1e-3):.1f} |" for name in shallow]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join([*lines, "", f"{about['cpu']}, {about['threads']} threads, {versions}, {about['date']}.", ""])


def main() -> None:
    measure(1)
    found = {
        "Exact, as a whole": {str(depth): measure(depth) for depth in DEPTHS},
        "Planning under a budget, without running models": {str(depth): planning(depth) for depth in DEPTHS},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compile_time.json").write_text(json.dumps({"seconds": found, **environment()}, indent=1, sort_keys=True) + "\n")
    text = markdown(found, environment())
    (RESULTS / "compile_time.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
