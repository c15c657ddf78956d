"""Writes benchmarks/results/README.md from the JSON files beside it."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks.gpu_goals import table

HEAD = """# Results

Written by `benchmarks/run.py` from the JSON files in this folder; every ratio comes from one shuffled race. Times faster: medians of the best
peer (eager, inductor with and without freezing, ONNX Runtime, OpenVINO, all at f32) over ours, with a 95 % bootstrap interval. Floor: the products of
the model at the best f32 rate that torch reached in calibration, or one pass over its weights where no cache holds them; convolutions may beat it.
"""


def write_summary(folder: Path) -> None:
    """Regenerate the page."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if "mode" in json.loads(path.read_text())]
    parts = [HEAD]
    for mode, title in (("exact", "Exact plans"), ("budget", "Plans within a budget")):
        results = [result for result in found if result["mode"] == mode]
        if results:
            parts += [f"\n## {title}\n", *_table(results, mode)]
    pages = [page for page in sorted(folder.glob("*.md")) if page.name != "README.md"]
    if pages:
        parts += ["\n## Other pages\n", *(f"- [{page.read_text().splitlines()[0].lstrip('# ')}]({page.name})" for page in pages)]
    (folder / "README.md").write_text("\n".join([*parts, *_gpu(folder)]) + "\n")


def _gpu(folder: Path) -> list[str]:
    """The figures of `benchmarks/gpu.py`: measured where its file is there, else each listed as not measured."""
    path = folder / "gpu.json"
    measured = json.loads(path.read_text()) if path.exists() else {"ratios": {}}
    about = (
        f"{measured['device']}, {measured['date']}." if path.exists() else "No GPU was at hand; `python benchmarks/gpu.py` measures them."
    )
    return ["", "## On a GPU", "", *table(measured["ratios"]), "", about]


def _table(results: list[dict[str, Any]], mode: str) -> list[str]:
    quality = mode == "budget"
    head = [
        "case",
        "best peer",
        "its ms",
        "ours, ms",
        *([] if quality else ["floor, ms"]),
        "times faster",
        "interval",
        "A/A",
        "runtime",
        "drop (held out)" if quality else "error; f64; ONNX Runtime",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    ratios = []
    for result in results:
        for case in result["cases"]:
            ours = next(row for name, row in case["rows"].items() if name.startswith("paretorch"))
            best, again = case["rows"][case["best peer"]], case["rows"]["eager again"]
            ratios.append(case["times best peer"])
            loss = f"{case['loss']:.4f} ± {case['half width']:.4f}, n = {case['samples']}" if case.get("loss") is not None else "none taken"
            lines.append(_line([
                case["case"], case["best peer"], f"{best['milliseconds']:.2f}", f"{ours['milliseconds']:.2f}",
                *([] if quality else [f"{case['floor ms']:.2f}"]), f"{case['times best peer']:.2f}",
                f"{case['interval'][0]:.2f} to {case['interval'][1]:.2f}", f"{again['times eager']:.2f}", case["runtime"],
                loss if quality else _errors(case),
            ]))  # fmt: skip
    mean = exp(sum(map(log, ratios)) / len(ratios))
    first = results[0]
    versions = ", ".join(f"{name} {found}" for name, found in first["versions"].items())
    return [*lines, "", f"Geometric mean: {mean:.2f}. {first['cpu']}, {first['threads']} threads, {versions}, {first['date']}."]


def _errors(case: dict[str, Any]) -> str:
    """What was handed out; then the graph after all exact rules, on torch at f64 and on ONNX Runtime at f32."""
    others = case.get("errors of exact rules", {})
    further = [f"{others[name]:.0e}" for name in ("eager float64", "onnxruntime float32") if name in others]
    return "; ".join([f"{case['relative error']:.0e}", *further])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
