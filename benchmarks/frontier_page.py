"""The table and the plot of `benchmarks/frontier.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import environment

ORIGINAL = "original"


def against_constant(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Plans that were selected with `tome` alone, each with the (drop, drift) that the same step in every layer has at its speed: between the two
    constant plans next to it, linearly, drifts by their logarithms. Those that are slower or faster than every constant plan are left out."""
    constant = sorted((row["times"], row["drop"], row["drift"]) for row in rows if row["plan"].startswith("tome at ") and row["drift"] > 0)
    found = []
    for row in rows:
        if row["plan"].startswith("selected tome "):
            left = max((place for place in constant if place[0] <= row["times"]), default=None)
            right = min((place for place in constant if place[0] > row["times"]), default=None)
            if left is not None and right is not None:
                share = (row["times"] - left[0]) / (right[0] - left[0])
                found.append((row, left[1] + share * (right[1] - left[1]), left[2] ** (1 - share) * right[2] ** share))
    return found


def markdown(found: dict[str, Any]) -> str:
    about = environment()
    lines = [
        "# Quality against measured speed of the rules that make tokens fewer", "",
        "`rule at knob`: the same step after every layer; `selected`: a step of its own for each layer, found on other data by predicted seconds and",
        f"measured loss, with `tome` alone or all rules of the family. Times faster: measured in one race on ONNX Runtime at f32. {about['cpu']},",
        f"{about['threads']} threads, {about['date']}. Drops in points, paired; drifts of what the model returns; half widths of 95 % intervals.",
    ]  # fmt: skip
    for name, model in found.items():
        low, high = model["A/A"][1:]
        lines += [
            "",
            f"## {name}",
            "",
            f"A/A: {model['A/A'][0]:.3f} ({low:.3f} to {high:.3f}). Quality: {model['quality']}. Drift: {model['drift']}.",
            "",
        ]
        lines += ["| plan | times faster | predicted | score | drop | n | drift |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row['plan']} | {row['times']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f}) | {row['predicted times']:.2f} "
            f"| {100 * row['score']:.2f} | {100 * row['drop']:.2f} ± {100 * row['half width']:.2f} | {row['n']:,} "
            f"| {row['drift']:.4f} ± {row['drift half width']:.4f} |"
            for row in model["rows"]
        ]
        lines += [
            "",
            "| `tome` with a step for each layer | times faster | drop | same step in every layer, at this speed | drift | same step |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {row['plan']} | {row['times']:.2f} | {100 * row['drop']:.2f} ± {100 * row['half width']:.2f} | {100 * drop:.2f} "
            f"| {row['drift']:.4f} ± {row['drift half width']:.4f} | {distance:.4f} |"
            for row, drop, distance in against_constant(model["rows"])
        ]
    return "\n".join([*lines, ""])


def plot(found: dict[str, Any], path: Path) -> None:
    """Two panels for each model: drop, and drift, against times faster, a line for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(found), figsize=(5 * len(found), 8), squeeze=False)
    colours: dict[str, str] = {}  # of a rule, the same in all panels
    for place, (name, model) in enumerate(found.items()):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in model["rows"]:
            rule = row["plan"].rsplit(" ", 2 if " at " in row["plan"] else 1)[0]
            lines.setdefault(rule, []).append(row)
            if rule != ORIGINAL:
                colours.setdefault(rule, f"C{len(colours)}")
        for panel, key, factor in ((panels[0][place], "drop", 100), (panels[1][place], "drift", 1)):
            for rule, rows in lines.items():
                if rule != ORIGINAL:
                    places = sorted((row["times"], factor * row[key]) for row in rows)
                    panel.plot(
                        *zip(*places, strict=True), marker="o" if rule.startswith("selected") else ".", label=rule, color=colours[rule]
                    )
            panel.set(xlabel="times faster, measured", ylabel=f"drop of {model['quality']}, points" if key == "drop" else model["drift"])
            panel.invert_yaxis()
        panels[1][place].set_yscale("log")
        panels[0][place].set_title(name)
        panels[0][place].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
