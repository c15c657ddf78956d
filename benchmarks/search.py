"""The search over all families against each family alone and against random plans, at equal numbers of evaluations.

    python benchmarks/search.py                      # writes benchmarks/results/search.json and .md
    python benchmarks/search.py --models minilm --samples 600 --evaluations 6

The figure is the hypervolume of the frontier: the area under it of times faster beyond one and loss left of the budget, each in its own unit, as a
share of (most times faster that any search reached) x (budget). Seconds are predicted, losses measured on the same ranking part.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run import RESULTS, environment
from benchmarks.workloads import workload
from paretorch import Budget
from paretorch.capture import capture
from paretorch.cost_model.devices import Target
from paretorch.exact import apply_exact
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import LoweringError, PlanError
from paretorch.plan import Choice
from paretorch.problem import Point, Problem
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import Candidate, propose
from paretorch.rewrites.normalize import normalize
from paretorch.search import search
from paretorch.session import Session, open_session
from paretorch.settle import settle_exact
from paretorch.stages import Stages

MODELS = ("dinov2", "minilm")
FAMILIES = ("layer_skipping", "token_merging", "sparse_attention", "precision")
SAMPLES = 3_000  # a sixth of them ranks
EVALUATIONS = 24
SEEDS = 3  # of random plans, whose mean is given


def opened(name: str, samples: int) -> tuple[Session, list[Candidate]]:
    """A session on a workload, calibrated and anchored as `optimize` does it, and all candidates."""
    made = workload(name).task
    assert made is not None  # the models named here have a task
    task = made(samples)
    budget = Budget(metric=task.metric, max_drop=task.max_drop)
    program = capture(task.case.model, task.case.inputs)
    target = Target.parse("cpu")
    session = open_session(program, normalize(program.graph), target, budget, task.data, Stages(None, None), RULES, 0, None)
    apply_exact(session)
    candidates = propose(session.exact, analyze(session.exact), session.lossy)[0]
    session.exact_result = settle_exact(session)
    session.measure_reduced(candidates)
    return session, candidates


def random_plans(problem: Problem, seed: int) -> list[Point]:
    """As many evaluated plans as the search may evaluate, each of a random number of random choices."""
    draws, base = random.Random(seed), problem.apply(())
    points = [Point((), *problem.price(base), 0.0, 0.0, 0)]
    sites = [candidate for candidate in problem.candidates if candidate.knobs]
    while len(points) <= problem.max_evaluations:
        chosen = draws.sample(sites, draws.randint(1, len(sites)))
        choices = tuple(sorted((Choice(c.rule.name, c.site.name, draws.choice(c.knobs)) for c in chosen), key=str))
        point = evaluated(problem, choices)
        points += [point] if point is not None else []
    return points


def evaluated(problem: Problem, choices: tuple[Choice, ...]) -> Point | None:
    """The point of these choices without those that do not go with the others; None if the rest fails."""
    while True:
        known = problem.conflict(choices)
        try:
            if known is None:
                graph = problem.apply(choices)
                return Point(choices, *problem.price(graph), *problem.loss(choices, graph))
        except PlanError as error:
            if not hasattr(error, "choice"):
                return None
            known = error.choice, str(error)
        except LoweringError:
            return None
        choices = tuple(choice for choice in choices if choice != known[0])


def hypervolume(points: Sequence[Point], base: float, limit: float) -> float:
    """Area between the frontier and (1 time faster, the budget): times faster beyond one x loss within the budget."""
    good = sorted((max(point.loss, 0.0), base / point.predicted - 1) for point in points if point.loss <= limit and point.predicted < base)
    area, best = 0.0, 0.0
    for place, (loss, gain) in enumerate(good):
        best = max(best, gain)
        right = good[place + 1][0] if place + 1 < len(good) else limit
        area += best * (right - loss)
    return area


def compare(name: str, samples: int, evaluations: int) -> dict[str, Any]:
    """Hypervolumes by way of searching, and the most times faster within the budget."""
    session, candidates = opened(name, samples)
    found: dict[str, list[list[Point]]] = {}
    for way in ("all families", *FAMILIES):
        own = [c for c in candidates if way in ("all families", c.rule.family)]
        if own:
            found[way] = [search(replace(session.problem(own), max_evaluations=evaluations))]
            print(name, way, len(found[way][0]), "points", flush=True)
    problem = replace(session.problem(candidates), max_evaluations=evaluations)
    found["random plans"] = [random_plans(problem, seed) for seed in range(SEEDS)]
    base = next(point.predicted for point in found["all families"][0] if not point.choices)
    limit = problem.limit
    fastest = {
        way: [max((base / p.predicted for p in points if p.loss <= limit), default=1.0) for points in runs] for way, runs in found.items()
    }
    whole = limit * max(max(values) - 1 for values in fastest.values())
    return {
        way: {
            "hypervolume": sum(hypervolume(points, base, limit) for points in runs) / len(runs) / whole,
            "times faster": sum(fastest[way]) / len(runs),
            "evaluations": sum(len(points) - 1 for points in runs) / len(runs),
        }
        for way, runs in found.items()
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    about = environment()
    lines = [
        "# The search against each family alone and against random plans", "",
        "Hypervolume: area under the frontier of times faster beyond one against loss within the budget of one point, as a share of the largest",
        f"rectangle. Seconds predicted, losses measured on ranking data; random plans: mean of {SEEDS} seeds. {about['cpu']}, {about['date']}.",
    ]  # fmt: skip
    for name, ways in found.items():
        lines += ["", f"## {name}", "", "| way | hypervolume | times faster within the budget | evaluations |", "|---|---|---|---|"]
        lines += [
            f"| {way} | {row['hypervolume']:.3f} | {row['times faster']:.2f} | {row['evaluations']:.0f} |" for way, row in ways.items()
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    args = parser.parse_args()
    kept = RESULTS / "search.json"
    is_full = (args.samples, args.evaluations) == (SAMPLES, EVALUATIONS)
    found = json.loads(kept.read_text())["found"] if is_full and kept.exists() else {}
    for name in args.models:
        found[name] = compare(name, args.samples, args.evaluations)
        print(markdown({name: found[name]}), flush=True)
        if is_full:
            RESULTS.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"found": found, **environment()}, indent=1) + "\n")
            kept.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
