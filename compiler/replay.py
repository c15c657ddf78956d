"""Applying a saved plan again: the same choices on the same architecture, without a search."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from paretorch.budget import Budget
from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.contest import Contender, run_race
from paretorch.cost_model.devices import Target
from paretorch.ir.errors import PlanError
from paretorch.optimized import Optimized
from paretorch.plan import WITHOUT_WEIGHTS, Plan
from paretorch.report import Report
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_rule
from paretorch.rewrites.normalize import normalize
from paretorch.session import open_session
from paretorch.stages import Stages


def replay(
    plan: Plan,
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any,
    *,
    target: str | Target = "cpu",
    dynamic_shapes: Any = None,
) -> Optimized:
    """The model with the plan's rewrites on the plan's runtime, timed beside the original. Its loss is not measured again: the report says so.

    A plan that was made without weights names exact rules only; they are applied wherever they are legal now that values are known.
    Runs on the plan's runtime, or on the one that the target names if that allows no other. Raises PlanError if the graph's fingerprint is not
    the plan's, or its runtime cannot be used here.
    """
    stages = Stages()
    target = target if isinstance(target, Target) else Target.parse(target)
    with stages("capture"):
        program = capture(model, example_inputs, dynamic_shapes)
    with stages("normalize"):
        graph = normalize(program.graph)
    session = open_session(program, graph, target, Budget(), None, stages, RULES, 0, None)
    if session.fingerprint != plan.fingerprint and not (plan.evidence.get(WITHOUT_WEIGHTS) and not len(plan)):
        raise PlanError(
            f"this plan was made for another graph (fingerprint {plan.fingerprint[:12]}, this model has {session.fingerprint[:12]}): "
            "the architecture, the shapes of the example inputs or the version of paretorch differ; call optimize instead"
        )
    with stages("apply"):
        for rule in RULES:
            if rule.name in plan.exact:
                session.exact = apply_rule(rule, session.exact)[0]
                session.exact_rules.append(rule.name)
        rewritten = session.apply(plan.choices)
    runtime = _runtime(plan, target, session.lowering.runtimes)
    with stages("lower"):
        execute = session.lowering.compile(rewritten, runtime)
    if execute is None:
        raise PlanError(f"the plan's runtime {runtime} cannot take this graph: {session.lowering.failures[runtime]}")
    contender = Contender("plan", runtime, rewritten, execute, session.predicted(rewritten, runtime))
    with stages("measure"):
        measured = run_race([contender], program.example, program.run_original, 0)
    if len(plan):
        session.notes.append("the plan was applied without data: its loss on this model was not measured")
    return Optimized(program, contender, plan, Report.of(session, plan, contender, None, measured), session)


def _runtime(plan: Plan, target: Target, usable: Collection[str]) -> str:
    """The runtime to run on. Raises PlanError if it is the plan's and cannot be used here."""
    if plan.runtime in usable:
        return plan.runtime
    if len(target.runtimes) == 1 and target.runtimes[0] in usable:
        return target.runtimes[0]
    reason = (
        RUNTIMES[plan.runtime].refuses() if plan.runtime in target.runtimes else f"the target {target} has {', '.join(target.runtimes)}"
    )
    raise PlanError(
        f"this plan was made for the runtime {plan.runtime}, which cannot be used here: {reason or 'it could not be calibrated'}; "
        "name one to run it on instead, such as target='cpu:eager', or call optimize"
    )
