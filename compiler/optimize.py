"""`optimize`: from a trained model to a faster one within a stated loss. This file reads as the table of contents of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import nn

from paretorch.budget import Budget
from paretorch.capture import Call, Program, as_call, capture
from paretorch.contest import disagreement
from paretorch.cost_model.devices import Target
from paretorch.exact import apply_exact
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import BudgetError, CaptureError, InputError
from paretorch.islands import optimize_islands
from paretorch.optimized import Optimized
from paretorch.rewrites import RULES, rules_named
from paretorch.rewrites.apply import Candidate, calibrated, propose
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Rule
from paretorch.session import Session, open_session
from paretorch.settle import settle, settle_exact
from paretorch.stages import Stages
from paretorch.weightless import is_weightless


def optimize(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any,
    *,
    target: str | Target = "cpu",
    budget: Budget | None = None,
    data: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    rules: Sequence[str] | None = None,
    without: Sequence[str] = (),
    time_limit: float | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool | Callable[[str, int, int], None] | None = None,
) -> Optimized:
    """A faster callable with the model's signature and output structure, whose loss is within the budget.

    model: an nn.Module in eval mode, or an ExportedProgram. One on the meta device is planned for without weights, by predictions alone.
    example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; they fix dtypes and, but for the axes in dynamic_shapes
    ({"input": {axis: "name"}} or torch.export's form), the shapes.
    target: `device[:chip][:runtime]`, for example "cpu", "cpu:onnxruntime", "onnx", "cuda:h100". budget: None for exact rewrites only.
    data: batches of inputs, or of (inputs, labels), on which the loss is measured; a part of it is never used for ranking and decides.
    rules, without: names of rules or families to use, or to leave out. time_limit: seconds, acted on between evaluations.
    executor: any concurrent.futures.Executor runs evaluations; what it loses is run here. progress: True for a bar, or a function of (stage, done, of).

    Raises InputError, CaptureError, TargetError, BudgetError, RuleError. If nothing is faster, the original comes back, with the reason.
    """
    target = target if isinstance(target, Target) else Target.parse(target)
    chosen = choose_rules(rules, without)
    budget = budget or Budget()
    stages = Stages(progress_callback(progress), time_limit)
    try:
        with stages("capture"):
            program = capture(model, example_inputs, dynamic_shapes)
            _check_captured(program, budget)
    except CaptureError as error:
        if isinstance(model, nn.Module) and is_weightless(model):
            raise
        return _in_parts(model, example_inputs, str(error), target=target, rules=rules, without=without, seed=seed)
    with stages("normalize"):
        graph = normalize(program.graph)
    session = open_session(program, graph, target, budget, data, stages, chosen, seed, executor)
    with stages("exact rewrites"):
        apply_exact(session)
    if budget.is_exact:
        return settle_exact(session)
    candidates = _proposed(session)
    session.exact_result = settle_exact(session)
    session.measure_reduced(candidates)
    session.search(candidates)
    return settle(session, session.exact_result)


def _proposed(session: Session) -> list[Candidate]:
    """Every legal lossy rewrite of the exact graph, with knob values for the user's data where a rule measures them."""
    with session.stages("analyze"):
        facts = analyze(session.exact)
    with session.stages("propose"):
        candidates, refusals = propose(session.exact, facts, session.lossy)
        session.refuse(refusals)
        return candidates if session.judge is None else calibrated(candidates, session.exact, session.judge.inputs())


def _check_captured(program: Program, budget: Budget) -> None:
    """Compare the captured graph with the model on the example.

    Raises CaptureError; InputError for a model that is no function of its inputs; BudgetError for a budget that needs weights which are not there.
    """
    if not program.has_weights:
        if not budget.is_exact:
            raise BudgetError(
                "the model is on the meta device, and what a plan loses cannot be measured without weights; leave the budget out, "
                "or load the weights"
            )
        return
    expected = program.run_original(*program.example)
    problem = disagreement(expected, program.graph.run(*program.example))
    if problem is None:
        return
    repeated = disagreement(expected, program.run_original(*program.example))
    if repeated is not None:
        raise InputError(
            f"the model gives other outputs when it is called again with the same inputs ({repeated}), so no plan can be checked against it; "
            "it draws random numbers or keeps state: pass what it draws as an input, or fix its seed inside forward"
        )
    raise CaptureError(f"what torch captured is not the model's function, even on example_inputs: {problem}")


def _in_parts(model: Any, example_inputs: Any, why: str, **options: Any) -> Optimized:
    """The submodules that can be captured, each optimized exactly. Raises CaptureError if there is none."""
    args, kwargs = as_call(example_inputs)

    def each(part: nn.Module, call: Call) -> Optimized:
        capture(part, call)  # raises here what `optimize` would take apart further
        return optimize(part, call, **options)

    return optimize_islands(model, args, kwargs, why, each)


def choose_rules(rules: Sequence[str] | None, without: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of this call in their fixed order. Raises RuleError for a name that is no rule and no family."""
    wanted = RULES if rules is None else rules_named(rules)
    banned = {rule.name for rule in rules_named(without)}
    return tuple(rule for rule in wanted if rule.name not in banned)


def progress_callback(progress: bool | Callable[[str, int, int], None] | None) -> Callable[[str, int, int], None] | None:
    if progress is True:
        from paretorch.progress import bar

        return bar()
    return progress or None


__all__ = ["Session", "optimize"]
