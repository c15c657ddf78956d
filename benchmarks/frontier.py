"""The frontier of the rules that make tokens fewer: quality on samples that no search saw against measured speed.

    python benchmarks/frontier.py                    # writes benchmarks/results/frontier.json and .md, and docs/frontier.png
    python benchmarks/frontier.py --models minilm --samples 400 --rounds 5
    python benchmarks/frontier.py --race             # times the plans in frontier.json anew, on a quiet machine

Each rule takes the same step after every layer, in all a share of the tokens at each of `TOTALS`; the selection finds a number for each layer, on its
own data, with `tome` alone and with all rules of the family, within the drift that `tome` has there with the same step in every layer. All plans of a
model run on ONNX Runtime at f32 and in one race with an A/A row, so their speeds can be compared. Drops are paired with the original on the same
samples; drifts tell plans apart that lose too little for the samples at hand. Half widths are of 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.frontier_page import ORIGINAL, markdown, plot
from benchmarks.run import RESULTS, environment
from paretorch import Budget
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.devices import Target
from paretorch.cost_model.measure import AGAIN, again, race, ratio
from paretorch.cost_model.quality import drift as distance
from paretorch.cost_model.quality import paired_drop
from paretorch.exact import apply_exact
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.metrics import top1
from paretorch.plan import Choice
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import Candidate, propose
from paretorch.rewrites.normalize import normalize
from paretorch.search import frontier, search
from paretorch.session import Session, open_session
from paretorch.settle import settle_exact
from paretorch.stages import Stages

RUNTIME = "onnxruntime"
TOTALS = (0.6, 0.9, 1.2, 2.0)  # of the tokens of the model, over its layers: beyond one, late layers have fewer left than they would take
FINER = (0.4, 0.75, 1.05, 1.5)  # for `tome` as well, beside whose plans selected ones are put
LIMIT = 1.2  # of `TOTALS`: what the selection may lose is what a constant step of this loses
PROGRESSIVE = ("tome", "pitome", "tofu", "evit", "divprune")  # those with a step after each attention
WAYS = {"selected tome": ("tome",), "selected": PROGRESSIVE}
SELECTED = 6  # plans of a selection's frontier that are measured
EVALUATIONS = 48
SAMPLES, RANKING = 1_000, 1_500  # that no search sees; of which the search ranks on a sixth
ROUNDS = 40

Run = Callable[..., Any]
Choices = tuple[Choice, ...]


@dataclass(frozen=True)
class Subject:
    """What is measured: budget: what of the selection's plans is held small, its limit is found anew; ranking: the selection's data; scores: of a
    callable on samples that no search saw, f64[n], higher is better."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    budget: Budget
    ranking: Sequence[Any]
    scores: Callable[[Run], Tensor]
    quality: str
    drift: str = "KL of the classes, in nats"


def classified(model: nn.Module, inputs: tuple[Tensor, ...], data: Sequence[Any], samples: int) -> Subject:
    """A subject of (inputs, labels) batches and top-1. The selection sees no labels: a few hundred of them tell little apart."""
    size = len(data[0][1])
    first = RANKING // size
    ranking, others = [data[i][0] for i in range(first)], [data[i] for i in range(first, min(len(data), first + samples // size))]

    def scores(run: Run) -> Tensor:
        return torch.cat([top1(run(*given), labels) for given, labels in others])

    return Subject(model, inputs, Budget(drift=1.0, measure="kl"), ranking, scores, "top-1")


def demo(samples: int) -> Subject:
    """The vision transformer that ships with the package, 197 tokens."""
    from paretorch.demo.run import test_images, trained_model

    images, labels = test_images()
    data = [((images[i : i + 16],), labels[i : i + 16]) for i in range(0, len(images) - 15, 16)]
    return classified(trained_model(), data[0][0], data, samples)


def dinov2(samples: int, side: int = 154) -> Subject:
    """DINOv2-S with its probe, 122 tokens at 154 pixels, 257 at 224."""
    from benchmarks.workloads import dinov2 as workload

    pixels, labels = workload.fashion_mnist("t10k")
    count = min(len(pixels), RANKING + samples) // 4 * 4
    data = [((workload.preprocess(pixels[i : i + 4], side),), torch.from_numpy(labels[i : i + 4])) for i in range(0, count, 4)]
    return classified(workload.classifier(side), data[0][0], data, samples)


def minilm(samples: int, length: int = 64) -> Subject:
    """MiniLM with its sentiment probe, padded sentences."""
    from benchmarks.workloads import minilm as workload

    texts, labels = workload.sentences()
    rest = slice(workload.TRAINING_SENTENCES, workload.TRAINING_SENTENCES + RANKING + samples)
    ids, mask = workload.encode(texts[rest], length)
    labels = labels[rest]
    data = [((ids[i : i + 8], mask[i : i + 8]), labels[i : i + 8]) for i in range(0, len(ids) - 7, 8)]
    return classified(workload.classifier(), data[0][0], data, samples)


def long_sentiment(_: int, length: int = 256) -> Subject:
    """MiniLM with its sentiment probe on whole reviews and editorials: the table has 496 of the 576 whose sign is plain, the selection the others."""
    from benchmarks.workloads import minilm as workload

    texts, ratings = workload.long_texts()
    ids, mask = workload.encode(texts, length)
    plain = (ratings.abs() > 0.25).nonzero()[:496, 0]
    rest = torch.ones(len(texts), dtype=torch.bool).index_fill_(0, plain, False).nonzero()[:, 0]
    ranking, others = ([(ids[i], mask[i]) for i in rows.split(8) if len(i) == 8] for rows in (rest, plain))
    labels = [(ratings[i] > 0).long() for i in plain.split(8)]

    def scores(run: Run) -> Tensor:
        return torch.cat([top1(run(*given), expected) for given, expected in zip(others, labels, strict=False)])

    return Subject(workload.classifier(), ranking[0], Budget(drift=1.0, measure="kl"), ranking, scores, "top-1")


def similarity(_: int, length: int = 256) -> Subject:
    """MiniLM's embeddings of documents: the selection ranks on how far those of 296 texts drift, the table correlates with ratings of 50 others."""
    from benchmarks.workloads import minilm as workload

    ids, mask = workload.encode(workload.documents("lee_background.cor"), length)
    batches = [(ids[i : i + workload.BATCH], mask[i : i + workload.BATCH]) for i in range(0, len(ids) - workload.BATCH + 1, workload.BATCH)]
    ranking = [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]

    def scores(run: Run) -> Tensor:
        return workload.lee_scores(run, length)

    return Subject(
        workload.embedder(),
        batches[0],
        Budget(drift=1.0, measure="cosine"),
        ranking,
        scores,
        "correlation of 1,225 pairs",
        "one minus cosine",
    )


def whisper(_: int) -> Subject:
    """Whisper tiny.en's encoder, 1,500 tokens; 11 clips: the selection ranks on divergences, the table counts words."""
    from benchmarks.workloads import whisper as workload

    case = workload.cases()[0]

    def scores(run: Run) -> Tensor:
        found = []
        for features, text in workload.clips():
            heard, said = workload.words(workload.transcribe(run(features))), workload.words(text)
            found += [-workload.edits(said, heard) / len(said)] * len(said)  # a row per word, so that clips count by their length
        return torch.tensor(found, dtype=torch.float64)

    budget = Budget(evaluate=workload.token_divergence, max_drop=1.0)
    return Subject(
        case.model,
        case.inputs,
        budget,
        list(range(len(workload.clips()))),
        scores,
        "words right (not beyond 11 clips)",
        "KL of the next token in nats, 9 clips",
    )


MODELS: dict[str, Callable[[int], Subject]] = {
    "demo ViT, 197 tokens": demo,
    "DINOv2-S, 122 tokens": dinov2,
    "DINOv2-S, 257 tokens": lambda samples: dinov2(samples // 2, 224),
    "MiniLM, 64 tokens": minilm,
    "MiniLM, 256 tokens": long_sentiment,
    "MiniLM similarity, 256 tokens": similarity,
    "Whisper tiny.en encoder, 1,500 tokens": whisper,
}


def opened(subject: Subject) -> tuple[Session, list[Candidate]]:
    """A session with the exact plan, and all candidates that make tokens fewer."""
    program = capture(subject.model, subject.inputs)
    rules = tuple(rule for rule in RULES if rule.is_exact or rule.name in PROGRESSIVE)
    target = Target.parse(f"cpu:{RUNTIME}")
    session = open_session(program, normalize(program.graph), target, subject.budget, subject.ranking, Stages(None, None), rules, 0, None)
    apply_exact(session)
    candidates = propose(session.exact, analyze(session.exact), session.lossy)[0]
    session.exact_result = settle_exact(session)
    return session, candidates


def constant(session: Session, candidates: Sequence[Candidate]) -> dict[str, Choices]:
    """Plans by name: each form of each rule with the same step in every layer, at `TOTALS` or what of its knob is nearest."""
    found: dict[str, Choices] = {}
    sites: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates:
        earlier = sum(1 for (name, form) in sites if name == candidate.rule.name and candidate.site.name in _names(sites[name, form]))
        sites.setdefault((candidate.rule.name, earlier), []).append(candidate)
    for (name, form), places in sites.items():
        for total in sorted((*TOTALS, *FINER) if name == "tome" else TOTALS):
            knob = _knob(places[0], total / len(places), _tokens(session.exact, places[0]))
            chosen: Choices = ()
            for place in places:
                try:
                    session.apply((*chosen, Choice(name, place.site.name, knob)))
                except PlanError:
                    break  # earlier layers left too few: the rest stays as it is
                chosen = (*chosen, Choice(name, place.site.name, knob))
            found[f"{name}{'' if form == 0 else f' (form {form + 1})'} at {knob}"] = chosen
    return found


def _names(places: Sequence[Candidate]) -> set[str]:
    return {place.site.name for place in places}


def _tokens(graph: Graph, candidate: Candidate) -> int:
    axis = next(axis for axis in analyze(graph).axes.tokens if candidate.site.name in axis.mixers)
    return int(axis.atom.size)


def _knob(candidate: Candidate, share: float, tokens: int) -> Any:
    """The value for this share of the tokens: counts are that number itself, shares the nearest that the rule offers."""
    if all(isinstance(value, int) for value in candidate.knobs):
        return max(1, round(share * tokens))
    return min(candidate.knobs, key=lambda value: (abs(abs(float(value or 0)) - share), str(value)))


def limited(session: Session, candidates: Sequence[Candidate]) -> Budget:
    """The subject's budget with the limit that a constant step of `tome` needs on the selection's data."""
    assert session.judge is not None  # subjects have budgets
    places = [candidate for candidate in candidates if candidate.rule.name == "tome"]
    name = f"tome at {_knob(places[0], LIMIT / len(places), _tokens(session.exact, places[0]))}"
    graph = session.apply(constant(session, places)[name])
    limit = float(session.judge.ranking(session.eager(graph), 0.0, math.inf).mean())
    print(f"limit: {limit:.4f}, as of {name}", flush=True)
    return replace(session.budget, **{"drift" if session.budget.drift is not None else "max_drop": limit})


def selected(session: Session, candidates: Sequence[Candidate], way: str) -> dict[str, Choices]:
    """Plans by name: of what the search found with these rules, the frontier at some speeds."""
    own = [candidate for candidate in candidates if candidate.rule.name in WAYS[way]]
    points = search(replace(session.problem(own), max_evaluations=EVALUATIONS))
    best = [point for point in frontier(points) if point.choices]
    print(way, [(f"{point.predicted * 1e3:.2f} ms", round(point.loss, 4)) for point in best], flush=True)
    few = best if len(best) <= SELECTED else [best[round(i * (len(best) - 1) / (SELECTED - 1))] for i in range(SELECTED)]
    return {f"{way} {number + 1}": point.choices for number, point in enumerate(few)}


def measure(name: str, samples: int, rounds: int) -> dict[str, Any]:
    """Rows of one model."""
    subject = MODELS[name](samples)
    session, candidates = opened(subject)
    plans: dict[str, Choices] = {ORIGINAL: (), **constant(session, candidates)}
    session.budget = limited(session, candidates)
    for way in WAYS:
        plans |= selected(session, candidates, way)
    runs = compiled(session, plans)
    scores: dict[str, Tensor] = {}
    rows = []
    expected: list[Any] = []  # what the original, which is the first, returns
    for plan, run in runs.items():
        scores[plan], outputs = recorded(subject, run)
        expected = expected or outputs
        drop, drift = paired_drop(scores[ORIGINAL], scores[plan]), paired_drop(distances(session, run, expected, outputs))
        rows.append({
            "plan": plan, "choices": [[choice.rule, choice.site, choice.knob] for choice in plans[plan]],
            "score": float(scores[plan].mean()), "drop": drop.mean, "half width": drop.half_width, "n": drop.n,
            "drift": drift.mean, "drift half width": drift.half_width,
        })  # fmt: skip
        print(f"{name}: {plan}: {rows[-1]['score']:.4f} of {drop.n}, drift {drift.mean:.5f}", flush=True)
    return timed(session, subject, runs, {"rows": rows, "quality": subject.quality, "drift": subject.drift}, rounds)


def timed_again(name: str, found: dict[str, Any], samples: int, rounds: int) -> dict[str, Any]:
    """The same rows, of plans that were scored before, with the seconds of a new race."""
    subject = MODELS[name](samples)
    session, _ = opened(subject)
    plans = {row["plan"]: tuple(Choice(*choice) for choice in row["choices"]) for row in found["rows"]}
    return timed(session, subject, compiled(session, plans), found, rounds)


def compiled(session: Session, plans: dict[str, Choices]) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for plan, choices in plans.items():
        execute = RUNTIMES[RUNTIME].compile(session.apply(choices), session.program.example)
        runs[plan] = lambda *inputs, execute=execute: session.program.unflatten(execute(*inputs))
    return runs


def timed(session: Session, subject: Subject, runs: dict[str, Run], found: dict[str, Any], rounds: int) -> dict[str, Any]:
    """What was found with the seconds of one race of all plans, and what was predicted."""
    calls = {plan: (lambda run=run: run(*subject.inputs)) for plan, run in runs.items()}
    print(f"racing {len(calls)} plans", flush=True)
    seconds = race(again(calls, ORIGINAL), rounds)
    base = session.predicted(session.exact, RUNTIME)
    rows = []
    for row in found["rows"]:
        times = ratio(seconds[ORIGINAL], seconds[row["plan"]])
        graph = session.apply(tuple(Choice(*choice) for choice in row["choices"]))
        rows.append({
            **row, "milliseconds": seconds[row["plan"]].seconds * 1e3, "times": times.value, "interval": [times.low, times.high],
            "predicted times": base / session.predicted(graph, RUNTIME),
        })  # fmt: skip
    same = ratio(seconds[ORIGINAL], seconds[ORIGINAL + AGAIN])
    return {**found, "rows": rows, "A/A": [same.value, same.low, same.high]}


def recorded(subject: Subject, run: Run) -> tuple[Tensor, list[Any]]:
    """The scores of a callable, and what it returned on the way."""
    outputs: list[Any] = []

    def recording(*inputs: Any) -> Any:
        outputs.append(run(*inputs))
        return outputs[-1]

    return subject.scores(recording), outputs


def distances(session: Session, run: Run, expected: Sequence[Any], found: Sequence[Any]) -> Tensor:
    """f64[n]: drift of each sample that was scored, by the budget's measure; of an `evaluate` budget minus its scores of held-out items."""
    budget = session.budget
    if budget.evaluate is not None:
        assert session.judge is not None  # subjects have budgets
        return -torch.tensor(budget.evaluate(run, session.judge.split.held_out), dtype=torch.float64)
    return torch.cat([distance(budget.measure, [a], [b]) for a, b in zip(expected, found, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), help=f"parts of names of {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--race", action="store_true", help="only time the plans that were scored before anew")
    args = parser.parse_args()
    kept = RESULTS / "frontier.json"
    is_full = (args.samples, args.rounds) == (SAMPLES, ROUNDS)
    found = json.loads(kept.read_text())["found"] if is_full and kept.exists() else {}
    for name in (name for name in MODELS if any(part in name for part in args.models)):
        if args.race:
            found[name] = timed_again(name, found[name], args.samples, args.rounds)
        else:
            found[name] = measure(name, args.samples, args.rounds)
        found = {each: found[each] for each in MODELS if each in found}
        print(markdown({name: found[name]}), flush=True)
        if is_full:
            RESULTS.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"found": found, **environment()}, indent=1) + "\n")
            kept.with_suffix(".md").write_text(markdown(found))
            plot(found, RESULTS.parent.parent / "docs" / "frontier.png")


if __name__ == "__main__":
    main()
