"""What `optimize` returns: a callable module with the original's signature, its plan, its report, and the session behind it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paretorch.capture import Program
from paretorch.codegen.kernel import Kernel
from paretorch.contest import Contender
from paretorch.explain import explain
from paretorch.generated import Generated
from paretorch.ir.errors import ArtifactError, BudgetError, InputError
from paretorch.ir.graph import Graph
from paretorch.plan import Plan
from paretorch.problem import Point
from paretorch.report import Report
from paretorch.search import frontier

if TYPE_CHECKING:
    from paretorch.session import Session


class Optimized(nn.Module):
    """Call it as the original model. plan, report, graph, kernels: what was done; frontier: the other plans of the search."""

    def __init__(
        self, program: Program, contender: Contender | None, plan: Plan, report: Report, session: Session | None,
        generated: Generated | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.program, self.contender, self.plan, self.report, self.session = program, contender, plan, report, session
        self._saved = generated or Generated()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's signature and output structure; no gradients. Raises InputError for inputs that do not fit the captured shapes."""
        if not self.program.has_weights:
            raise InputError(
                "this plan was made without weights, so there is nothing to run; build the model with its weights and apply it: "
                "result.plan.apply(model, inputs)"
            )
        if self.contender is None:
            with torch.no_grad():
                return self.program.call_original(*args, **kwargs)
        return self.program.call(self.contender.execute, args, kwargs)

    @property
    def graph(self) -> Graph:
        """The rewritten graph; prints as text."""
        return self.contender.graph if self.contender is not None else self.program.graph

    @property
    def frontier(self) -> list[Point]:
        """Plans that no other evaluated plan beats in both predicted seconds and loss on the ranking part, fastest first."""
        return frontier(self.session.points) if self.session is not None else []

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The generated kernels of the graph's planned regions, one for all regions that differ in names only; `compile` on each needs no GPU.

        Made for a GPU target, here or not; none for a processor, and none where the original came back. Their schedules are those that were fastest
        where the GPU is here; elsewhere the first of each template that the GPU holds, which takes seconds to find out once. Raises LoweringError.
        """
        return self.generated.kernels

    @cached_property
    def generated(self) -> Generated:
        """The kernels, with the regions that they serve."""
        if self.session is None or self.contender is None or self.session.tuner is None:
            return self._saved
        return Generated.of(self.session.fusion.plan(self.contender.graph).priced, self.session.tuner)

    def choose(self, max_drop: float) -> Optimized:
        """The fastest plan of the same search that holds this budget on held-out data; no new search.

        Raises BudgetError if this result has no search behind it (exact, or loaded from a file).
        """
        from paretorch.settle import settle

        if self.session is None or not self.session.points:
            raise BudgetError("this result has no search behind it to choose from; call optimize with a budget and data")
        limit = self.session.budget.limit
        assert limit is not None  # a session with points had a budget
        if not 0 <= max_drop <= limit:
            raise BudgetError(f"max_drop={max_drop} is outside of what was searched, 0 to {limit}; call optimize with that budget")
        return settle(self.session, self.session.exact_result, max_drop)

    def explain(self) -> str:
        """Every rule and site: taken, priced out, over budget, illegal (with its sentence), in conflict."""
        return explain(self.report)

    def save(self, path: str | Path) -> None:
        """Write one file without pickle: weights, graph, plan, report, and the lowered model. Raises ArtifactError."""
        from paretorch.artifact import save

        if self.contender is None:
            raise ArtifactError("the original model was returned, so there is nothing of ours to save; save the model itself")
        if not self.program.has_weights:
            raise ArtifactError(
                "this plan was made without weights, so there is no model to save; save the plan alone: result.plan.save(path)"
            )
        save(self, Path(path))
