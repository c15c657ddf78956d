"""`paretorch demo`: the whole of the main job on a model and data that ship with the package."""

from __future__ import annotations

import time
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from paretorch.budget import Budget
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.devices import Target
from paretorch.demo.model import FashionViT
from paretorch.metrics import top1
from paretorch.optimize import optimize
from paretorch.optimized import Optimized

BATCH = 16
SEARCH_SECONDS = 90  # from the start of optimize; what was found by then is judged
BUDGETS = (0.005, 0.01, 0.02)  # share of images, so half a point to two points of top-1
QUICK_IMAGES = 1_500


def trained_model() -> FashionViT:
    """The shipped model, in eval mode."""
    model = FashionViT()
    with as_file(files("paretorch.demo") / "fashion_vit.safetensors") as path:
        model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()})
    return model.eval()


def test_images() -> tuple[Tensor, Tensor]:
    """f32[6000, 1, 28, 28] in [0, 1] and i64[6000]: the first 6,000 of Fashion-MNIST's test images, none of which was trained on."""
    with as_file(files("paretorch.demo") / "fashion_test.npz") as path, np.load(path) as stored:
        images = torch.from_numpy(stored["images"]).float()[:, None] / 255
        return images, torch.from_numpy(stored["labels"].astype(np.int64))


def run(html: Path, *, quick: bool = False) -> Optimized:
    """Optimise exactly, then within each budget from one search; print the tables and write the last report as a page."""
    console, began = Console(), time.perf_counter()
    model = trained_model()
    images, labels = test_images()
    count = QUICK_IMAGES if quick else len(images)
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, count - BATCH + 1, BATCH)]
    budget = Budget(metric=top1, max_drop=max(BUDGETS))
    calibrate({name: RUNTIMES[name] for name in Target.parse("cpu").runtimes})  # kept, so that the search has its seconds for itself
    console.print(
        f"Fashion-MNIST, {count:,} test images; a vision transformer with 197 tokens; batch {BATCH}; {torch.get_num_threads()} threads"
    )
    widest = optimize(model, batches[0][0], budget=budget, data=batches, time_limit=SEARCH_SECONDS, progress=True)
    session = widest.session
    assert session is not None  # a fresh result keeps its session
    results = [("exact", session.exact_result), *((f"{limit:.1%}", widest.choose(limit)) for limit in BUDGETS[:-1])]
    results.append((f"{BUDGETS[-1]:.1%}", widest))
    console.print(_table(results))
    console.print(str(widest.report), markup=False, highlight=False)
    widest.report.to_html(html)
    console.print(f"report written to {html}; {time.perf_counter() - began:.0f} s in all")
    return widest


def _table(results: list[tuple[str, Optimized]]) -> Table:
    title = "measured beside the original; drop on held-out images, paired, with its 95% interval"
    table = Table(
        "budget", "predicted", "measured", "drop, points", "n", "runtime", "approximate rewrites", title=title, title_justify="left"
    )
    for name, result in results:
        report = result.report
        predicted = (
            ""
            if not report.predicted_seconds or not report.original_seconds
            else f"{report.original_seconds / report.predicted_seconds:.2f}x"
        )
        drop = "0 (exact)" if report.loss is None else f"{100 * report.loss:.2f} ± {100 * (report.half_width or 0):.2f}"
        choices = ", ".join(sorted({choice.rule for choice in result.plan})) or "none"
        table.add_row(name, predicted, f"{report.speedup or 1:.2f}x", drop, f"{report.samples or ''}", report.runtime, choices)
    return table
