"""The last rung of capture: when the whole model cannot be captured, its largest submodules that can be are optimized, exactly, each on its own.

The model's own Python runs between them as eager glue. Weights are shared with the original, not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paretorch.capture import Call
from paretorch.contest import disagreement
from paretorch.cost_model.measure import race
from paretorch.ir.errors import CaptureError, InputError, ParetorchError
from paretorch.ir.protocols import Measurement

if TYPE_CHECKING:
    from paretorch.optimized import Optimized

ROUNDS = 8
SMALLEST = 2  # calls that a captured submodule must hold to be worth its border


class Island(nn.Module):
    """A submodule that runs optimized where its inputs fit what was captured, and as it was otherwise."""

    def __init__(self, original: nn.Module, optimized: Optimized) -> None:
        super().__init__()
        self.original, self.optimized = original, optimized

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.optimized(*args, **kwargs)
        except InputError:
            return self.original(*args, **kwargs)


def optimize_islands(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str, optimize: Callable[[nn.Module, Call], Optimized]
) -> Optimized:
    """The model with its islands optimized.

    Raises CaptureError, with `why` the whole could not be captured, if no submodule can be, or the result is not the model's.
    """
    glued = _shallow(model)
    calls = _record(model, args, kwargs)
    found: dict[str, Optimized] = {}
    _visit(model, "", calls, found, optimize)
    if not found:
        raise CaptureError(f"the model cannot be captured, and none of its submodules can be. {why}")
    for path, optimized in found.items():
        parent, _, name = path.rpartition(".")
        setattr(glued.get_submodule(parent), name, Island(model.get_submodule(path), optimized))
    return _finish(model, glued, args, kwargs, found, why)


def _shallow(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    handles = []
    for path, module in model.named_modules():
        if path:

            def keep(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any], path: str = path) -> None:
                calls.setdefault(path, Call(a, dict(k)))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _visit(
    module: nn.Module, path: str, calls: dict[str, Call], found: dict[str, Optimized], optimize: Callable[[nn.Module, Call], Optimized]
) -> None:
    """Largest first: a child that cannot be captured is looked into."""
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        call = calls.get(place)
        try:
            if call is not None and _is_worth(child):
                found[place] = optimize(child, call)
                continue
        except ParetorchError:
            pass  # this one is glue; what it holds is tried below, and the report lists what was found
        _visit(child, place, calls, found, optimize)


def _is_worth(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and sum(1 for _ in module.modules()) >= SMALLEST


def _finish(
    model: nn.Module, glued: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: dict[str, Optimized], why: str
) -> Optimized:
    from paretorch.optimized import Optimized
    from paretorch.plan import Plan

    def run(target: nn.Module) -> Any:
        with torch.no_grad():
            return target(*args, **kwargs)

    expected, result = (torch.utils._pytree.tree_leaves(run(each)) for each in (model, glued))
    problem = disagreement([x for x in expected if isinstance(x, Tensor)], [x for x in result if isinstance(x, Tensor)])
    if problem is not None:
        raise CaptureError(f"the model with optimized submodules is not the same function: {problem}. {why}")
    measured: dict[str, Measurement] = race({"original": lambda: run(model), "islands": lambda: run(glued)}, rounds=ROUNDS)
    is_faster = measured["islands"].seconds < measured["original"].seconds
    first = next(iter(found.values()))
    notes = [f"the whole model could not be captured: {why}", *(f"{path}: {each.report.sentence()}" for path, each in found.items())]
    if not is_faster:
        notes.append("the optimized submodules were not faster together; the original is returned")
    report = replace(
        first.report, runtime="eager with islands" if is_faster else "original", predicted_seconds=None, loss=None, notes=tuple(notes),
        measured_seconds=measured["islands" if is_faster else "original"].seconds, original_seconds=measured["original"].seconds, timings=(),
    )  # fmt: skip
    program = replace(first.program, original=glued if is_faster else model)
    return Optimized(program, None, Plan(runtime=report.runtime, exact=first.plan.exact), report, None)
