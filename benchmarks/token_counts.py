"""Whether a runtime likes token counts that are multiples of 8 or 16: one transformer block at every count between two.

    python benchmarks/token_counts.py                # writes benchmarks/results/token_counts.json and .md

A straight line through the seconds at all counts says what a token costs. What pays is a multiple whose block lies below the line by more than the
others scatter around it: then it is worth it to round the number of tokens that a rule leaves. All counts of a runtime run in one race.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch

from benchmarks.prediction_models import Block
from benchmarks.run import RESULTS, environment
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.measure import race
from paretorch.rewrites.normalize import normalize

BATCH, WIDTH, HEADS = 4, 384, 6
COUNTS = range(112, 146)  # two multiples of 16 with neighbours on both sides
CONTENDERS = (("eager", "f32"), ("eager", "bf16"), ("onnxruntime", "f32"), ("openvino", "f32"))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 40


def seconds(runtime: str, dtype: str, rounds: int) -> dict[int, float]:
    """Seconds of a block by its number of tokens."""
    calls = {}
    for count in COUNTS:
        torch.manual_seed(0)
        x = torch.randn(BATCH, count, WIDTH, dtype=DTYPES[dtype])
        graph = normalize(capture(Block(WIDTH, HEADS).eval().to(DTYPES[dtype]), (x,)).graph)
        calls[str(count)] = lambda execute=RUNTIMES[runtime].compile(graph, (x,)), x=x: execute(x)
    return {int(count): found.seconds for count, found in race(calls, rounds).items()}


def off_the_line(measured: dict[int, float]) -> dict[int, float]:
    """How far the seconds at each count lie from the line through all of them, as shares of it."""
    counts = numpy.array(sorted(measured), dtype=float)
    values = numpy.array([measured[int(count)] for count in counts])
    line = numpy.polyval(numpy.polyfit(counts, values, 1), counts)
    return {int(count): float(share) for count, share in zip(counts, values / line - 1, strict=True)}


def row(runtime: str, dtype: str, rounds: int) -> dict[str, Any]:
    off = off_the_line(seconds(runtime, dtype, rounds))
    groups = {
        "of 16": [share for count, share in off.items() if count % 16 == 0],
        "of 8 alone": [share for count, share in off.items() if count % 16 == 8],
        "others": [share for count, share in off.items() if count % 8],
    }
    quarter = statistics.quantiles(groups["others"], n=4)
    found = {name: statistics.median(shares) for name, shares in groups.items()}
    return {"runtime": runtime, "dtype": dtype, **found, "scatter of others": quarter[2] - quarter[0], "counts": off}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    about = environment()
    lines = [
        "# Token counts that runtimes like", "",
        f"One transformer block, {WIDTH} wide, batch {BATCH}, at every count from {COUNTS[0]} to {COUNTS[-1]}: how far from a straight line",
        "through all counts the seconds at multiples lie (medians), and how far apart the middle half of the other counts lies.",
        f"{about['cpu']}, {about['threads']} threads, {about['date']}.", "",
        "| runtime | dtype | multiples of 16 | of 8, not of 16 | other counts | their scatter |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['runtime']} | {r['dtype']} | {r['of 16']:+.1%} | {r['of 8 alone']:+.1%} | {r['others']:+.1%} | {r['scatter of others']:.1%} |"
        for r in rows
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    rows = []
    for runtime, dtype in CONTENDERS:
        if RUNTIMES[runtime].refuses() is None:
            rows.append(row(runtime, dtype, args.rounds))
            print({key: value for key, value in rows[-1].items() if key != "counts"}, flush=True)
    if args.rounds == ROUNDS:
        (RESULTS / "token_counts.json").write_text(json.dumps({"rows": rows, **environment()}, indent=1) + "\n")
        (RESULTS / "token_counts.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
