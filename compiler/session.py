"""The state of one `optimize`: graphs, prices, the judge, evidence. Kept by its result, so that `choose` needs no new search."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from paretorch.budget import Budget
from paretorch.capture import Program
from paretorch.codegen.reduced import with_wide_weights
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.codegen.tuning import Tuner
from paretorch.conflicts import Conflicts
from paretorch.contest import SLOW_TO_COMPILE, Contender, Lowering, contenders, run_race
from paretorch.cost_model.break_even import break_evens, sentence
from paretorch.cost_model.calibrate import DERIVED, analytic, calibrate
from paretorch.cost_model.devices import Target
from paretorch.cost_model.memory import output_bytes
from paretorch.cost_model.price import Prices
from paretorch.cost_model.quality import Drop, paired_drop
from paretorch.data import prepare
from paretorch.evidence import Evidence, evidence_of
from paretorch.fusion import RUNTIME, Fusion
from paretorch.ir.errors import LoweringError, PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.hash import structural_hash
from paretorch.ir.ops.quantized import rounding_of
from paretorch.ir.protocols import Cost, Executable
from paretorch.judge import FIRST_LOOK, Judge, drift_of
from paretorch.ledger import Entry, Ledger
from paretorch.plan import Choice
from paretorch.pricing import pricing_of
from paretorch.problem import ConflictError, Point, Problem
from paretorch.rewrites.apply import Candidate, apply_choice
from paretorch.rewrites.rule import MODEL, Refusal, Rule, Site
from paretorch.search import BUDGET_SHARES, search
from paretorch.spread import Ahead, Sent, between_looks, running_plan, spread
from paretorch.stages import Stages
from paretorch.tuning import equip

ORDER = ("layer_skipping", "token_merging", "sparse_attention", "precision")  # lossy families, in the order in which they are applied
MAX_EVALUATIONS = 64
KEPT_GRAPHS = 64
REDUCED_ROUNDS = 5
FULL = ""  # the precision that models come in
OUTPUTS_KEPT = 1e9  # bytes of outputs that an executor may send back before they are scored
MEMORY_SLACK = 1.02  # liveness is counted at tensors; alignment and scratch space are not


@dataclass
class Session:
    """See the module's card. `exact` is the normalized graph after the exact rules."""

    program: Program
    normalized: Graph
    target: Target
    budget: Budget
    stages: Stages
    rules: tuple[Rule, ...]
    prices: Prices
    lowering: Lowering
    judge: Judge | None
    seed: int
    executor: Executor | None = None
    ledger: Ledger = field(default_factory=Ledger)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # evaluations that the executor lost, why
    evidence: dict[str, Any] = field(default_factory=dict)
    exact_rules: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    judged: dict[tuple[Choice, ...], tuple[Contender, Drop] | None] = field(default_factory=dict)  # held-out results, by plan
    anchors: dict[tuple[str, str], float] = field(default_factory=dict)  # by runtime and `precision_of`
    kept: Evidence = field(default_factory=lambda: Evidence(None))  # of ranking data, from this search and earlier ones
    tuner: Tuner | None = None  # what chooses the schedules of generated kernels
    exact: Graph = field(init=False)
    exact_result: Any = None  # the Optimized of the exact plan, what `choose` falls back to
    _break_evens: dict[str, str] = field(default_factory=dict)
    _applied: dict[tuple[Choice, ...], Graph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact = self.normalized

    @cached_property
    def conflicts(self) -> Conflicts:
        """What is known not to go together on the exact graph."""
        return Conflicts(self.exact, self.rules)

    @cached_property
    def fingerprint(self) -> str:
        """The structural hash that a saved plan is checked against."""
        return structural_hash(self.normalized)

    @property
    def exact_candidates(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.is_exact)

    @property
    def lossy(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if not rule.is_exact)

    @property
    def is_measurable(self) -> bool:
        """Whether this machine is the target and the model has weights; otherwise predictions decide."""
        return self.target.is_here and self.program.has_weights

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Names of the runtimes that the target allows and that are installed; for a device that is not here, those it is priced for."""
        return self.target.runtimes if not self.target.is_here else tuple(self.lowering.runtimes)

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        families = {rule.name: rule.family for rule in self.rules}
        for refusal in refusals:
            self.ledger.add(Entry(refusal.rule, families.get(refusal.rule, ""), refusal.site, "illegal", refusal.reason))

    # prices

    def predicted(self, graph: Graph, runtime: str, weights: int | None = None) -> float:
        """Predicted seconds on one runtime, corrected by what this very model measured there, if it did. weights: as for `Prices.graph_cost`."""
        return self.cost(graph, runtime, weights).seconds * self._anchor(runtime, precision_of(graph))

    def cost(self, graph: Graph, runtime: str, weights: int | None = None) -> Cost:
        """Predicted cost of one call; on the Triton runtime that of its planned regions."""
        return self.fusion.plan(self.fusion.form(graph)).cost if runtime == RUNTIME else self.prices.graph_cost(graph, runtime, weights)

    @cached_property
    def fusion(self) -> Fusion:
        """What plans the regions that run as generated kernels."""
        return Fusion(self.prices)

    def _anchor(self, runtime: str, precision: str) -> float:
        """Measured over predicted seconds of this model there; else at a part of its precisions, or where that runtime's rates come from."""
        base = DERIVED.get(runtime, runtime)
        forms = (precision, *reversed(precision.split(" and ")), FULL)
        keys = [(name, form) for form in forms for name in (runtime, base)]
        return next((self.anchors[key] for key in keys if key in self.anchors), 1.0)

    def price(self, graph: Graph, weights: int | None = None) -> tuple[float, str]:
        """Predicted seconds on the runtime that is predicted to be fastest."""
        able = [name for name in self.runtimes if not self.target.is_here or self.lowering.runtimes[name].refuses(graph) is None]
        return min(((self.predicted(graph, name, weights), name) for name in able), default=(float("inf"), "eager"))

    def memory_refusal(self, graph: Graph) -> str | None:
        """Why a plan's graph is predicted to need too much memory: more than the original's, or than the budget allows."""
        peak, original = self.prices.peak_memory(graph), self.prices.peak_memory(self.program.graph)
        allowed = self.budget.max_memory_bytes
        if allowed is not None and peak > allowed:
            return f"it is predicted to need {peak / 1e6:.1f} MB; the budget allows {allowed / 1e6:.1f} MB"
        if peak > MEMORY_SLACK * original:
            return f"it is predicted to need {peak / 1e6:.1f} MB, more than the original's {original / 1e6:.1f} MB"
        return None

    def _break_even(self, choice: Choice) -> str:
        """From which sizes a choice pays, as a sentence; looked for once per rule, since each answer takes dozens of prices."""
        if choice.rule not in self._break_evens:
            found = break_evens(self.exact, self.apply((choice,)), lambda graph: self.price(graph)[0])
            self._break_evens[choice.rule] = sentence(found, self.exact)
        return self._break_evens[choice.rule]

    # plans

    def apply(self, choices: tuple[Choice, ...]) -> Graph:
        """The exact graph with these choices applied. Raises PlanError if they do not go together."""
        ordered = self.ordered(choices)
        by_name = {rule.name: rule for rule in self.rules}
        graph, done = self.exact, 0
        for length in range(len(ordered), 0, -1):
            if ordered[:length] in self._applied:
                graph, done = self._applied[ordered[:length]], length
                break
        for length in range(done, len(ordered)):
            choice = ordered[length]
            if choice.rule not in by_name:
                raise PlanError(f"the plan uses the rule {choice.rule!r}, which is not among the rules of this call")
            try:
                graph = apply_choice(by_name[choice.rule], graph, choice.site, choice.knob)
            except PlanError as error:
                raise ConflictError(self._clash(ordered[:length], choice, str(error)), choice) from error
            while len(self._applied) >= KEPT_GRAPHS:
                self._applied.pop(next(iter(self._applied)))
            self._applied[ordered[: length + 1]] = graph
        return graph

    def _clash(self, earlier: tuple[Choice, ...], choice: Choice, reason: str) -> str:
        """The reason with the one among the earlier choices after which this one fails alone, if there is such a one."""
        by_name = {rule.name: rule for rule in self.rules}
        for other in earlier if len(earlier) > 1 else ():
            try:
                apply_choice(by_name[choice.rule], self.apply((other,)), choice.site, choice.knob)
            except PlanError as error:
                return self.conflicts.learn(other, choice, str(error))
        return self.conflicts.learn(earlier[0], choice, reason) if len(earlier) == 1 else reason

    def ordered(self, choices: Iterable[Choice]) -> tuple[Choice, ...]:
        """In the order of application: by family, wider rules first, then by place in the graph."""
        families = {rule.name: (rule.family, place) for place, rule in enumerate(self.rules)}
        places = {node.name: place for place, node in enumerate(self.exact.nodes)}

        def key(choice: Choice) -> tuple[int, int, int, str]:
            family, rule = families.get(choice.rule, ("", 0))
            place = places.get(Site(choice.site).parts[0], len(places))
            return (ORDER.index(family) if family in ORDER else len(ORDER), rule, place, str(choice))

        return tuple(sorted(choices, key=key))

    def eager(self, graph: Graph) -> Executable:
        """The graph as plain torch, for evaluations while the search runs."""
        module = with_wide_weights(graph).module()

        def execute(*inputs: torch.Tensor) -> tuple[Any, ...]:
            with running_plan():
                return module(*inputs)  # type: ignore[no-any-return]

        return execute

    # search

    def search(self, candidates: Sequence[Candidate]) -> None:
        """Fill `points` with evaluated plans."""
        with self.stages("search"):
            problem = self.problem(candidates)
            self.points = search(problem)
        if self.lost:
            run = "evaluation was" if len(self.lost) == 1 else "evaluations were"
            self.notes.append(f"{len(self.lost)} {run} run here because the executor lost them: {self.lost[0]}")
        if problem.was_interrupted:
            self.notes.append("the search was interrupted; the best plan until then is judged and returned")
        for point in self.points:
            self.evidence[f"loss {'; '.join(map(str, point.choices)) or 'exact'}"] = [point.loss, point.half_width, point.samples]

    def problem(self, candidates: Sequence[Candidate]) -> Problem:
        """What the search is asked: plans made of these candidates, on this session's graph, prices and data."""
        judge, limit = self.judge, self.budget.limit
        assert judge is not None and limit is not None  # only with a budget  # noqa: PT018
        self.kept = evidence_of(self.exact, self.budget, judge.split, self.seed)
        return Problem(
            candidates=candidates,
            apply=self.apply,
            price=self.price,
            drifts=self._drifts,
            loss=self._loss,
            limit=limit,
            max_evaluations=MAX_EVALUATIONS,
            stages=self.stages,
            seed=self.seed,
            record=self._record,
            evidence=self.evidence,
            memory=self.prices.peak_memory,
            pricing=pricing_of(self),
            break_even=self._break_even,
            conflict=lambda choices: self.conflicts.first(self.ordered(choices)),
            slot=self._slot,
        )

    def _slot(self, choice: Choice) -> Hashable:
        """Rules that make tokens fewer take turns at a place; all others have it for themselves."""
        fewer = any(rule.name == choice.rule and "token_count" in rule.invalidates for rule in self.rules)
        return ("token_count" if fewer else choice.rule, choice.site)

    def _loss(self, choices: tuple[Choice, ...], graph: Graph) -> tuple[float, float, int]:
        """Mean loss on the ranking part, half width, samples. Raises PlanError for a plan that needs too much memory, LoweringError."""
        judge, limit = self.judge, self.budget.limit
        assert judge is not None and limit is not None  # only with a budget  # noqa: PT018
        too_large = self.memory_refusal(graph)
        if too_large is not None:
            raise PlanError(too_large)
        name = f"loss {'; '.join(map(str, choices))} of {limit}"
        kept = self.kept.get(name)
        if kept is None:
            drop = paired_drop(judge.ranking(self._over_ranking(graph), min(BUDGET_SHARES) * limit, limit), seed=self.seed)
            kept = [drop.mean, drop.half_width, drop.n]
            self.kept.put(name, kept)
        return kept[0], kept[1], int(kept[2])

    def _drifts(self, choices: Sequence[Choice], samples: int) -> list[float | str]:
        """The label-free drift of each choice alone, or why it could not be run; what is not known is spread over the executor."""
        assert self.judge is not None  # only the search calls this
        found: dict[Choice, float | str] = {c: kept[0] for c in choices if (kept := self.kept.get(f"drift {c} of {samples}"))}
        missing = [choice for choice in choices if choice not in found]
        graphs = [self.apply((choice,)) for choice in missing]
        if not self._is_spread:
            results = [self._drift(graph, samples) for graph in graphs]
        else:
            probe = self.judge.probe(samples) if graphs else []
            results = self._spread(drift_of, [(Sent.of(graph), probe) for graph in graphs])
        for choice, drift in zip(missing, results, strict=True):
            found[choice] = drift
            if not isinstance(drift, str):
                self.kept.put(f"drift {choice} of {samples}", [drift])
        return [found[choice] for choice in choices]

    @property
    def _is_spread(self) -> bool:
        """Whether evaluations run on the executor; a loop of the user's own does not."""
        return self.executor is not None and self.budget.evaluate is None

    def _spread(self, function: Callable[..., Any], argument_lists: Sequence[Sequence[Any]]) -> list[Any]:
        assert self.executor is not None  # asked by the callers
        results, lost = spread(self.executor, function, argument_lists)
        self.lost += lost
        return results

    def _over_ranking(self, graph: Graph) -> Executable:
        """The graph for the ranking part, whose batches between two looks are spread over the executor."""
        if not self._is_spread:
            return self.eager(graph)
        assert self.judge is not None  # only the search calls this
        most = max(1, int(OUTPUTS_KEPT // max(1, output_bytes(graph))))
        return Ahead(Sent.of(graph), between_looks(self.judge.split.ranking, FIRST_LOOK, most), self._spread)

    def _drift(self, graph: Graph, samples: int) -> float | str:
        assert self.judge is not None  # only the search calls this
        try:
            return self.judge.output_drift(self.eager(graph), samples)
        except LoweringError as error:
            return str(error)

    def measure_reduced(self, candidates: Sequence[Candidate]) -> None:
        """Time the whole model in each reduced precision that is offered: the rates of single products say little about a runtime's casts."""
        if not self.target.is_here:
            return
        forms = {}
        for offered in (c for c in candidates if c.rule.family == "precision" and c.site.name == MODEL):
            try:
                forms[offered.rule.name] = self.apply((Choice(offered.rule.name, MODEL, offered.knobs[-1]),))
            except PlanError:
                continue
        if not forms:
            return
        with self.stages("lower"):
            able = [name for name in self.runtimes if name not in SLOW_TO_COMPILE]
            predicted = {
                (form, name): self.cost(graph, name).seconds
                for form, graph in forms.items() for name in able if self.lowering.runtimes[name].refuses(graph) is None
            }  # fmt: skip
            entered = contenders(self.lowering, forms, predicted)
        if not entered:
            return
        with self.stages("measure"):
            measured = run_race(entered, self.program.example, None, self.seed, REDUCED_ROUNDS)
        for contender in entered:
            self.anchors[contender.runtime, precision_of(contender.graph)] = measured[contender.label].seconds / contender.predicted

    def _record(self, verdict: str, choice: Choice, reason: str, saved: float | None, drift: float | None) -> None:
        family = next((rule.family for rule in self.rules if rule.name == choice.rule), "")
        self.ledger.add(Entry(choice.rule, family, choice.site, verdict, reason, choice.knob, saved, drift))


def precision_of(graph: Graph) -> str:
    """Which fewer bits a graph computes in, FULL if none: measured over predicted seconds differ by it."""
    values = [node.meta["val"].dtype for node in graph.calls if isinstance(node.meta.get("val"), torch.Tensor)]
    half = ["half"] if torch.bfloat16 in values or torch.float16 in values else []
    kept = {rounding.name for node in graph.calls if (rounding := rounding_of(node)) is not None}
    return " and ".join([*sorted(kept), *half]) or FULL


def open_session(
    program: Program,
    graph: Graph,
    target: Target,
    budget: Budget,
    data: Iterable[Any] | None,
    stages: Stages,
    rules: tuple[Rule, ...],
    seed: int,
    executor: Executor | None,
) -> Session:
    """Calibrate (or read a calibration), prepare the data, and put everything together. Raises BudgetError, TargetError."""
    runtimes = {name: RUNTIMES[name] for name in target.runtimes if RUNTIMES[name].refuses() is None} if target.is_here else {}
    judge = None
    if not budget.is_exact:
        with stages("data"):
            judge = Judge(program, budget, prepare(program, data, budget, seed), program.callable_with)
    with stages("calibrate"):
        row = target.device if target.device.kind in ("cuda", "rocm") else None  # a CPU's row is an assumption that measurements replace
        calibration = calibrate(runtimes, device=row) if target.is_here else analytic(target.device)
        usable = {name: runtime for name, runtime in runtimes.items() if (name, "f32") in calibration.rates}
    notes = [f"{name} was left out: none of its calibration probes ran" for name in runtimes if name not in usable]
    notes += [calibration.facts["disturbed"]] if "disturbed" in calibration.facts else []
    session = Session(
        program=program,
        normalized=graph,
        target=target,
        budget=budget,
        stages=stages,
        rules=rules,
        prices=Prices(calibration, target.device),
        lowering=Lowering(usable, program.example),
        judge=judge,
        seed=seed,
        executor=executor,
        notes=notes,
    )
    equip(session, usable)
    return session
