"""The last gate: what is handed out was compiled, compared with the original, and timed beside it.

Never slower, never silently different; otherwise the next best plan, down to the original itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from paretorch.attempts import Attempts
from paretorch.contest import SLOW_TO_COMPILE, Contender, contenders, disagreement, late_contenders, run_race
from paretorch.cost_model.measure import HEATS, ratio
from paretorch.cost_model.memory import weight_bytes
from paretorch.cost_model.quality import Drop, accepts, paired_drop
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Measurement
from paretorch.ledger import Entry
from paretorch.optimized import Optimized
from paretorch.plan import WITHOUT_WEIGHTS, Choice, Plan
from paretorch.problem import Point
from paretorch.report import Report
from paretorch.session import Session, precision_of

ANCHOR_ROUNDS = 8
LARGE_WEIGHTS = 500e6  # bytes of weights beyond which only one form of the graph is compiled: each runtime keeps a copy or two


@dataclass(frozen=True)
class Outcome:
    """What will be handed out: a contender, or the original if it is None."""

    contender: Contender | None
    choices: tuple[Choice, ...] = ()
    drop: Drop | None = None


def settle_exact(session: Session) -> Optimized:
    """The fastest exact contender on any allowed runtime, if it beats the original. Anchors the session's prices by what was measured."""
    if not session.is_measurable:
        return _unmeasured(session, (), session.exact)
    original = session.program.run_original
    expected = original(*session.program.example)
    variants = _exact_variants(session)
    agreed = _field(session, variants, lambda entered: _agreeing(session, entered, expected))
    with session.stages("measure"):
        measured = run_race(agreed, session.program.example, original, session.seed)
    _anchor(session, agreed, measured)
    best = min(agreed, key=lambda c: (measured[c.label].seconds, c.label), default=None)
    if best is not None and _is_slower(measured[best.label], measured["original"]):
        session.notes.append(f"the best exact plan ({best.label}) was not faster than the original; the original is returned")
        best = None
    session.lowering.keep_only([best] if best is not None else [])
    return _hand_out(session, Outcome(best), measured)


def _exact_variants(session: Session) -> dict[str, Graph]:
    """The graph after the exact rules, and the one before them while their compiled forms fit into memory side by side."""
    too_large = session.memory_refusal(session.exact) if session.exact_rules else None
    if too_large is not None:
        session.notes.append(f"the exact rules were left out: {too_large}")
        return {"normalized": session.normalized}
    if not session.exact_rules or weight_bytes(session.exact) > LARGE_WEIGHTS:
        return {"exact": session.exact}
    return {"exact": session.exact, "normalized": session.normalized}


def settle(session: Session, exact: Optimized, limit: float | None = None) -> Optimized:
    """The fastest evaluated plan that holds on held-out data and on the clock; `exact` if none does."""
    limit = session.budget.limit if limit is None else limit
    assert limit is not None and session.judge is not None  # only called with a budget  # noqa: PT018
    hopeful = [point for point in session.points if point.choices and point.loss <= limit]
    attempts = Attempts(hopeful, limit)
    for point in attempts:
        outcome = _judge(session, point, limit)
        if outcome is None or outcome.contender is None:
            judged = session.judged[point.choices]
            attempts.learn(point, judged[1] if judged is not None else None)
            continue
        if not session.target.is_here:
            if outcome.contender.predicted < session.price(session.exact)[0]:
                return _unmeasured(session, outcome.choices, outcome.contender.graph, outcome.drop)
            continue
        with session.stages("measure"):
            rivals = [outcome.contender, *([exact.contender] if exact.contender is not None else [])]
            measured = run_race(rivals, session.program.example, session.program.run_original, session.seed)
        ours = measured[outcome.contender.label]
        rival = min((name for name in measured if name != outcome.contender.label), key=lambda name: measured[name].seconds)
        if _is_slower(ours, measured[rival]):
            theirs = f"{rival} with {measured[rival].seconds * 1e3:.2f} ms"
            _note(session, point, "not taken", f"measured {ours.seconds * 1e3:.2f} ms, no faster than {theirs}")
            continue
        return _hand_out(session, outcome, measured)
    if not hopeful:
        session.notes.append("no approximate plan was within the budget on the ranking data; the exact plan is returned")
    _mark_taken(session, ())
    return Optimized(session.program, exact.contender, exact.plan, exact.report.after(session), session)


def _field(
    session: Session, variants: dict[str, Graph], fit: Callable[[list[Contender]], list[Contender]] = lambda entered: entered
) -> list[Contender]:
    """Who may win a race of these graphs: compiled where predicted to be close; what takes long to compile once the others were timed."""
    lowering = session.lowering

    def predicted() -> dict[tuple[str, str], float]:
        pairs = ((name, graph, runtime) for name, graph in variants.items() for runtime in session.runtimes)
        return {
            (name, runtime): session.predicted(graph, runtime)
            for name, graph, runtime in pairs
            if lowering.runtimes[runtime].refuses(graph) is None
        }

    with session.stages("lower"):
        entered = contenders(lowering, variants, predicted())
    with session.stages("check"):
        entered = fit(entered)
    if not entered or set(session.runtimes).isdisjoint(SLOW_TO_COMPILE):
        return entered
    with session.stages("measure"):
        heats = run_race(entered, session.program.example, None, session.seed, HEATS)
    _anchor(session, entered, heats)
    with session.stages("lower"):
        late = late_contenders(lowering, variants, predicted(), min(found.seconds for found in heats.values()))
    with session.stages("check"):
        return entered + fit([found for found in late if found.label not in heats])


def _judge(session: Session, point: Point, limit: float) -> Outcome | None:
    """This plan with its drop on held-out data; None if it failed or the drop is not within the limit. Measured once per plan."""
    if point.choices not in session.judged:
        session.judged[point.choices] = _measure(session, point)
    found = session.judged[point.choices]
    if found is None:
        return None
    contender, drop = found
    refusal = accepts(drop, limit, session.budget.confidence)
    if refusal is not None:
        _note(session, point, "over budget", refusal)
        return None
    return Outcome(contender, session.ordered(point.choices), drop)


def _measure(session: Session, point: Point) -> tuple[Contender, Drop] | None:
    """Compile this plan where it is predicted to be fastest and measure its paired drop on held-out data; None if it fails, with a note.

    For a device that is not here the drop is that of the plan as plain torch.
    """
    judge, limit = session.judge, session.budget.limit
    assert judge is not None and limit is not None  # settle checked  # noqa: PT018
    graph = session.apply(point.choices)
    too_large = session.memory_refusal(graph)
    if too_large is not None:
        _note(session, point, "over budget", too_large)
        return None
    best = _fastest(session, point, graph) if session.target.is_here else _predicted(session, graph)
    if best is None:
        return None
    try:
        with session.stages("held out"):
            drop = paired_drop(judge.held_out(best.execute, limit), seed=session.seed)
    except LoweringError as error:
        _note(session, point, "failed", str(error))
        return None
    session.lowering.keep_only([best, *([session.exact_result.contender] if session.exact_result.contender is not None else [])])
    session.evidence[f"held out {'; '.join(map(str, point.choices))}"] = [drop.mean, drop.half_width, drop.n]
    return best, drop


def _fastest(session: Session, point: Point, graph: Graph) -> Contender | None:
    """This plan on the runtime that is measured to be fastest; None if it runs on none, with a note."""
    entered = _field(session, {"plan": graph})
    if not entered:
        _note(session, point, "failed", "; ".join(f"{name}: {why}" for name, why in session.lowering.failures.items()))
        return None
    with session.stages("measure"):
        measured = run_race(entered, session.program.example, None, session.seed, ANCHOR_ROUNDS)
    best = min(entered, key=lambda c: (measured[c.label].seconds, c.label))
    seconds = measured[best.label].seconds
    session.points = [replace(p, measured_seconds=seconds) if p.choices == point.choices else p for p in session.points]
    return best


def _predicted(session: Session, graph: Graph) -> Contender:
    """A graph on the runtime that is predicted to be fastest on a device that is not here; it runs as plain torch."""
    seconds, runtime = session.price(graph)
    graph = session.lowering.form(graph, runtime)
    return Contender("plan", runtime, graph, session.eager(graph), seconds)


def _agreeing(session: Session, entered: Sequence[Contender], expected: Sequence[object]) -> list[Contender]:
    """Contenders whose outputs on the example are the original's; the others are reported."""
    agreed = []
    for contender in entered:
        problem = disagreement(expected, contender.execute(*session.program.example))
        if problem is None:
            agreed.append(contender)
        else:
            session.notes.append(f"{contender.label} was left out: {problem}")
    return agreed


def _anchor(session: Session, entered: Sequence[Contender], measured: dict[str, Measurement]) -> None:
    """Measured over predicted seconds of this model, by runtime: corrects the predictions of its plans."""
    for contender in entered:
        if contender.variant != "normalized" or not session.exact_rules:
            plain = session.cost(contender.graph, contender.runtime).seconds
            session.anchors[contender.runtime, precision_of(contender.graph)] = measured[contender.label].seconds / plain


def _is_slower(ours: Measurement, other: Measurement) -> bool:
    """Whether the whole interval of ours / other lies at or above one."""
    return ratio(ours, other).low >= 1.0


def _note(session: Session, point: Point, verdict: str, reason: str) -> None:
    session.ledger.add(Entry("plan", "", "; ".join(map(str, point.choices)), verdict, reason, None, None, point.loss))


def _hand_out(session: Session, outcome: Outcome, measured: dict[str, Measurement]) -> Optimized:
    """Plan, report and callable of this outcome."""
    contender = outcome.contender
    _mark_taken(session, outcome.choices)
    exact = tuple(session.exact_rules) if contender is not None and contender.variant != "normalized" else ()
    runtime = contender.runtime if contender is not None else "original"
    evidence = {**session.evidence, **{f"seconds {name}": m.seconds for name, m in measured.items()}}
    plan = Plan(outcome.choices, exact, runtime, session.fingerprint, evidence)
    report = Report.of(session, plan, contender, outcome.drop, measured)
    return Optimized(session.program, contender, plan, report, session)


def _mark_taken(session: Session, choices: tuple[Choice, ...]) -> None:
    """Say in the ledger that these lossy choices were taken, and no others: an earlier outcome of this session may have taken more."""
    taken = {(choice.rule, choice.site): choice for choice in choices}
    for entry in list(session.ledger):
        choice = taken.get((entry.rule, entry.site))
        if choice is not None:
            session.ledger.add(replace(entry, verdict="taken", reason="", knob=choice.knob))
        elif entry.verdict == "taken" and entry.knob is not None:
            session.ledger.add(replace(entry, verdict="not taken", reason="a plan with it was not the best within this budget"))


def _unmeasured(session: Session, choices: tuple[Choice, ...], graph: Graph, drop: Drop | None = None) -> Optimized:
    """For a device that is not here: the gate is the prediction, and the callable runs as plain torch. drop: of a plan that is not exact."""
    _mark_taken(session, choices)
    if not session.program.has_weights:
        found = ["the model has no weights: nothing was run or measured, the prediction decided; apply the plan to the model with weights"]
    else:
        found = [f"{session.target} is not here: no time was measured, the prediction decided; the callable runs as plain torch"]
    memory, device = session.prices.peak_memory(graph), session.target.device
    if memory > device.memory_bytes:
        found.append(f"one call is predicted to need {memory / 1e9:.1f} GB; {device.name} has {device.memory_bytes / 1e9:.0f} GB")
    session.notes += [note for note in found if note not in session.notes]
    evidence = session.evidence if session.program.has_weights else {**session.evidence, WITHOUT_WEIGHTS: True}
    contender = _predicted(session, graph)
    plan = Plan(session.ordered(choices), tuple(session.exact_rules), contender.runtime, session.fingerprint, dict(evidence))
    return Optimized(session.program, contender, plan, Report.of(session, plan, contender, drop, {}), session)
