"""What a session runs with on a GPU: tuned schedules of generated kernels, and calls that are replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from paretorch.codegen.cuda_graphs import Graphed
from paretorch.codegen.schedule_cache import ScheduleCache
from paretorch.codegen.triton_runtime import TritonRuntime
from paretorch.codegen.tuning import Tuner
from paretorch.cost_model.devices import Target
from paretorch.cost_model.fingerprint import cache_folder
from paretorch.cost_model.measure import device_timing, race
from paretorch.fusion import RUNTIME
from paretorch.ir.errors import TargetError
from paretorch.ir.protocols import Measurement, Runtime
from paretorch.rewrites.normalize.read_pages import page_refusals

if TYPE_CHECKING:
    from paretorch.session import Session

GPU_KINDS = ("cuda", "rocm")
KERNEL_SECONDS = 1.0  # after the heats of a race between schedules, or between a replay and a plain call, no round begins after these
LOSES = 1.2


def tuner_for(target: Target, notes: list[str]) -> Tuner | None:
    """What chooses schedules for a target: by the clock where the device is here, by the static model where it is not; None for no GPU."""
    if target.device.kind not in GPU_KINDS:
        return None
    name = torch.cuda.get_device_name() if target.is_here else target.device.name
    cache = ScheduleCache(name, target.device.arch, cache_folder(), notes)
    return Tuner(target.device.arch, cache, race_kernels if target.is_here else None, notes=notes)


def race_kernels(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Measurement]:
    """Seconds of launches on the device."""
    return race(contenders, rounds, timing=device_timing(), time_limit=KERNEL_SECONDS, lose=LOSES)


def race_calls(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Measurement]:
    """Seconds of whole calls, as their caller sees them."""
    return race(contenders, rounds, time_limit=KERNEL_SECONDS)


def equip(session: Session, usable: dict[str, Runtime]) -> None:
    """Give a session its tuner, and its runtimes what they need on a GPU, among it the form of graphs that kernels read. usable: by name, as they
    were calibrated; edited.

    Calls are not replayed while rates are measured, whose large inputs would be copied for nothing.
    """
    session.tuner = tuner_for(session.target, session.notes)
    session.lowering.form = lambda graph, runtime: session.fusion.form(graph) if runtime == RUNTIME else graph
    if RUNTIME in session.runtimes:
        session.refuse(page_refusals(session.normalized))
    if RUNTIME in usable:
        usable[RUNTIME] = TritonRuntime(lambda graph: session.fusion.plan(graph).priced, session.tuner)
    if session.target.device.kind == "cuda" and session.target.is_here:
        usable.update({name: Graphed(runtime, race_calls, session.notes) for name, runtime in usable.items()})


def tuner_here() -> Tuner | None:
    """For what was saved elsewhere; None where no GPU with a row is here."""
    try:
        return tuner_for(Target.parse("cuda"), [])
    except TargetError:  # no GPU, or one of which nothing is known: the templates' defaults stay
        return None
