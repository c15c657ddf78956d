"""Seconds of each stage of an exact `optimize`, on a ViT-S-sized model of 12 layers and on one of 48.

python benchmarks/compile_time.py                # writes benchmarks/results/compile_time.json and .md
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import paretorch
from benchmarks.prediction_models import Vision
from benchmarks.run import RESULTS, environment

DEPTHS = (12, 48)
WIDTH, HEADS, BATCH = 384, 6, 1


def measure(depth: int) -> dict[str, float]:
    """Seconds by stage. Calibration is read from its cache: a model of one layer was optimized before."""
    torch.manual_seed(0)
    model, images = Vision(WIDTH, HEADS, depth).eval(), torch.randn(BATCH, 3, 224, 224)
    began = time.perf_counter()
    stages = dict(paretorch.optimize(model, images).report.stages)
    return {**stages, "whole": time.perf_counter() - began}


def markdown(found: dict[str, dict[str, float]], about: dict[str, Any]) -> str:
    shallow, deep = (found[str(depth)] for depth in DEPTHS)
    lines = [
        f"# Seconds of an exact `optimize`: ViT-S, {BATCH} x 3 x 224 x 224", "", "| stage | 12 layers | 48 layers | ratio |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {stage} | {shallow[stage]:.2f} | {deep[stage]:.2f} | {deep[stage] / max(shallow[stage], 1e-3):.1f} |" for stage in shallow
    ]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join([*lines, "", f"{about['cpu']}, {about['threads']} threads, {versions}, {about['date']}.", ""])


def main() -> None:
    measure(1)
    found = {str(depth): measure(depth) for depth in DEPTHS}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compile_time.json").write_text(json.dumps({"seconds": found, **environment()}, indent=1, sort_keys=True) + "\n")
    text = markdown(found, environment())
    (RESULTS / "compile_time.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
