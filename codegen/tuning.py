"""Choosing schedules: each template's candidates, those that the device holds, and of these the one that takes the least time there.

Tuner.schedules(regions) -> a schedule for each region
The candidates of all kernels are compiled for the architecture in one process, which needs no GPU, and what spills, does not fit or keeps too little
in flight is left out (`occupancy.py`). Where the device is here, the rest are raced on inputs of the region's real sizes; of those within 2 % of the
fastest the first is taken, so that noise does not choose. Where it is not here, the first one that is left is taken: the template's default, unless
that does not fit, so later candidates are compiled only then. Choices are kept (`schedule_cache.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.kernel import Binary, Kernel, Region, Schedule, compile_each
from paretorch.codegen.occupancy import schedule_refusal
from paretorch.codegen.region_inputs import region_inputs, size_class
from paretorch.codegen.regions import schedules_of
from paretorch.codegen.schedule_cache import FILTERED, TIMED, Choice, ScheduleCache
from paretorch.codegen.triton_text import render
from paretorch.ir.errors import LoweringError, TargetError
from paretorch.ir.protocols import Measure

ROUNDS = 12
BAND = 1.02  # times the fastest: what is no slower than this is taken for as fast

Compile = Callable[[Sequence[Kernel], Sequence[str]], dict[tuple[str, str], Binary | str]]


@dataclass(frozen=True)
class Task:
    """A region whose schedule is looked for. candidates: kernels of one region, which differ in their schedule and in the number of their name."""

    region: Region
    key: str
    candidates: tuple[Kernel, ...]


@dataclass
class Tuner:
    """measure: times candidates on the device, None where it is not here; device: where the inputs lie; notes: what could not be done, and why."""

    arch: str
    cache: ScheduleCache
    measure: Measure | None = None
    device: torch.device | str = "cuda"
    compile: Compile = compile_each
    inputs: Callable[[Region, torch.device | str], list[Tensor]] = region_inputs
    notes: list[str] = field(default_factory=list)
    _unsure: dict[str, Choice] = field(default_factory=dict)  # choices that are not kept on disk: a later process may do better

    def schedules(self, regions: Sequence[Region]) -> list[Schedule]:
        """For each region. Raises LoweringError if no template takes one of them."""
        tasks, first = [], 0
        for region in regions:
            tasks.append(self._task(region, first))
            first += len(tasks[-1].candidates)
        chosen = {task.key: task.candidates[0].schedule for task in tasks if len(task.candidates) == 1}
        chosen |= {task.key: choice.schedule for task in tasks if task.key not in chosen and (choice := self._known(task)) is not None}
        missing = list({task.key: task for task in tasks if task.key not in chosen}.values())
        if missing:
            found = self._choose(missing)
            if sure := {key: choice for key, (choice, is_sure) in found.items() if is_sure}:
                self.cache.put(sure)
            self._unsure |= {key: choice for key, (choice, is_sure) in found.items() if not is_sure}
            chosen |= {key: choice.schedule for key, (choice, _) in found.items()}
        return [chosen[task.key] for task in tasks]

    def _task(self, region: Region, first: int) -> Task:
        offered = schedules_of(region)
        text = render(region, 0, offered[0]).source.partition("\nSCHEDULE = ")[2].partition("\n")[2]
        digest = hashlib.sha256("\n".join((text, size_class(region), repr(offered))).encode()).hexdigest()[:24]
        return Task(region, digest, tuple(render(region, first + place, schedule) for place, schedule in enumerate(offered)))

    def _known(self, task: Task) -> Choice | None:
        """What is kept for this kernel, if it is one of its candidates, and was timed where that can be done."""
        if task.key in self._unsure:
            return self._unsure[task.key]
        choice = self.cache.get(task.key)
        own = next((kernel.schedule for kernel in task.candidates if choice is not None and kernel.schedule == choice.schedule), None)
        if choice is None or own is None or (choice.by != TIMED and self.measure is not None):
            return None
        return replace(choice, schedule=own)  # in the candidate's order, which sources are written in

    def _choose(self, tasks: Sequence[Task]) -> dict[str, tuple[Choice, bool]]:
        """By key: (choice, whether it is to be kept)."""
        try:
            left = self._filtered(tasks)
        except (TargetError, LoweringError) as error:  # triton, or its compiler for this architecture, is not here
            self._note(f"schedules are the templates' defaults: {error}")
            return {task.key: (_choice(task.candidates[0], FILTERED), False) for task in tasks}
        return {task.key: self._timed(task, left[task.key]) for task in tasks}

    def _filtered(self, tasks: Sequence[Task]) -> dict[str, list[Kernel]]:
        """The candidates that the device holds, by key: all of them if they can be timed, else the first. Raises TargetError, LoweringError."""
        left: dict[str, list[Kernel]] = {task.key: [] for task in tasks}
        reasons: dict[str, str] = {}
        is_timed, most = self.measure is not None, max(len(task.candidates) for task in tasks)
        for place in range(1 if is_timed else most):
            those = slice(None) if is_timed else slice(place, place + 1)
            tried = [(task, kernel) for task in tasks if not left[task.key] for kernel in task.candidates[those]]
            binaries = self.compile([kernel for _, kernel in tried], [self.arch]) if tried else {}
            for task, kernel in tried:
                binary = binaries[kernel.name, self.arch]
                reason = binary if isinstance(binary, str) else schedule_refusal(kernel, binary)
                if reason is None:
                    left[task.key].append(kernel)
                else:
                    reasons.setdefault(task.key, reason)
        for task in tasks:
            if not left[task.key]:
                self._note(f"no schedule of {task.region} is held by {self.arch}, and its default is taken: {reasons[task.key]}")
        return left

    def _timed(self, task: Task, left: Sequence[Kernel]) -> tuple[Choice, bool]:
        if not left:
            return _choice(task.candidates[0], FILTERED), False
        if self.measure is None:
            return _choice(left[0], FILTERED), True
        if len(left) == 1:
            return _choice(left[0], TIMED), True
        try:
            inputs = self.inputs(task.region, self.device)
            running = [kernel for kernel in left if self._runs(kernel, inputs)]
            calls: dict[str, Callable[[], Any]] = {kernel.name: partial(kernel.launch, *inputs) for kernel in running}
            found = self.measure(calls, ROUNDS) if calls else {}
        except Exception as error:  # no memory for the inputs, or a launch that failed late: the static model decides
            self._note(f"{task.region} was not timed: {type(error).__name__}: {_first_line(error)}")
            return _choice(left[0], FILTERED), False
        if not found:
            return _choice(left[0], FILTERED), False
        timed = [(kernel, found[kernel.name].seconds) for kernel in left if kernel.name in found]
        fastest = min(seconds for _, seconds in timed)
        best = next(kernel for kernel, seconds in timed if seconds <= BAND * fastest)
        return _choice(best, TIMED, {_text(kernel.schedule): seconds for kernel, seconds in timed}), True

    def _runs(self, kernel: Kernel, inputs: Sequence[Any]) -> bool:
        """Whether a launch succeeds: the driver has the last word on what a device holds."""
        try:
            kernel.launch(*inputs)
        except Exception as error:  # triton and the driver raise many kinds; the others are timed
            self._note(f"{_text(kernel.schedule)} of {kernel.name} was left out: {type(error).__name__}: {_first_line(error)}")
            return False
        return True

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _choice(kernel: Kernel, by: str, seconds: dict[str, float] | None = None) -> Choice:
    return Choice(kernel.name.split("_", 2)[2], kernel.schedule, by, seconds or {})


def _text(schedule: Schedule) -> str:
    return ", ".join(f"{name}={value}" for name, value in schedule.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
