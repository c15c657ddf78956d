"""Kernels: a template with its slots filled for one region of a graph, as source that can be read, run, and compiled without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from torch.fx import Node

from paretorch.ir.errors import LoweringError, TargetError

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "gfx942")  # of the devices that have a row
Schedule = dict[str, int]


@dataclass(frozen=True)
class Region:
    """Nodes that become one kernel.

    template: a name of TEMPLATES; nodes: what is computed, and the views between; reads: values from outside; writes: values that someone outside
    uses; all in graph order. shape: what the kernel runs over: elements of it, or its rows.
    """

    template: str
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    shape: tuple[Any, ...]

    @property
    def is_rows(self) -> bool:
        return self.template != "elementwise"

    def __str__(self) -> str:
        return f"{self.template}({', '.join(node.name for node in self.nodes)})"


@dataclass(frozen=True)
class KernelTemplate:
    """text: the kernel with ${slots} for names, expressions and their lines, never control flow.
    schedules: (width of a row, or None; values that a thread holds at once) -> launch options, the first is the default."""

    name: str
    text: str
    schedules: Callable[[int | None, int], tuple[Schedule, ...]]

    def fill(self, **slots: str) -> str:
        """The text with its slots filled; lines that are left empty by a slot are dropped."""
        lines = Template(self.text).substitute(slots).splitlines()
        return "\n".join(line for line in lines if line.strip()) + "\n"


@dataclass(frozen=True)
class Binary:
    """What a compiler made of a kernel. spills: bytes (NVIDIA) or registers (AMD) that did not fit and went to memory.

    parts: of the file's other device functions; the figures are then the largest of all, the binary is that of the first.
    """

    arch: str
    registers: int
    spills: int
    shared_bytes: int
    binary: bytes
    parts: tuple[Binary, ...] = ()


@dataclass(frozen=True)
class Part:
    """Another device function of a kernel's file. parameters and schedule: as those of the kernel."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    schedule: Schedule


@dataclass(frozen=True)
class Kernel:
    """A generated kernel.

    source: the whole file; region: its nodes as text; parameters: (name, Triton type) of each argument that is not constexpr; constants: those that
    are, beside the schedule; predicted_s: of one launch, None if it was not priced; uses: how many regions of the graph it serves; parts: what it
    launches after the first function. An integer's type ends in ":16" where multiples of 16 are expected; triton looks at each launch.
    """

    name: str
    source: str
    region: str
    template: str
    schedule: Schedule
    parameters: tuple[tuple[str, str], ...]
    constants: Schedule = field(default_factory=dict)
    predicted_s: float | None = None
    uses: int = 1
    parts: tuple[Part, ...] = ()

    @cached_property
    def module(self) -> ModuleType:
        """The source as a module, with `launch` in it. Needs triton."""
        path = Path(_folder().name) / f"{self.name}_{sha256(self.source.encode()).hexdigest()[:12]}.py"
        path.write_text(self.source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # a .py file always has a loader
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def launch(self) -> Callable[..., object]:
        """Takes the region's reads and returns its writes, one tensor or a tuple."""
        found: Callable[..., object] = self.module.launch
        return found

    def compile(self, arch: str) -> Binary:
        """Compile for an architecture, without a GPU. Raises TargetError for an unknown one, LoweringError if the compiler fails."""
        return compile_kernels([self], [arch])[self.name, arch]


@cache
def _folder() -> TemporaryDirectory[str]:
    """Where sources stand that this process loads: triton reads a kernel's text from its file."""
    return TemporaryDirectory(prefix="paretorch-kernels-")


def compile_kernels(kernels: Sequence[Kernel], archs: Sequence[str]) -> dict[tuple[str, str], Binary]:
    """Binaries by kernel name and architecture, all made in one process of their own, where triton's interpreter is off.

    Raises TargetError if an architecture is unknown or the installed triton has no backend for it, LoweringError if a kernel does not compile.
    """
    found = {}
    for key, binary in compile_each(kernels, archs).items():
        if isinstance(binary, str):
            raise LoweringError(binary)
        found[key] = binary
    return found


def compile_each(kernels: Sequence[Kernel], archs: Sequence[str]) -> dict[tuple[str, str], Binary | str]:
    """As `compile_kernels`, with a sentence in place of the binary of a kernel that does not compile."""
    unknown = [arch for arch in archs if arch not in ARCHITECTURES]
    if unknown:
        raise TargetError(f"no architecture named {unknown[0]!r}; known: {', '.join(ARCHITECTURES)}")
    with TemporaryDirectory(prefix="paretorch-compile-") as folder:
        jobs = []
        for kernel in kernels:
            path = Path(folder) / f"{kernel.name}.py"
            path.write_text(kernel.source)
            whole = Part(kernel.name, kernel.parameters, kernel.constants | kernel.schedule)
            for part in (whole, *kernel.parts):
                job = {"path": str(path), "kernel": part.name, "parameters": part.parameters, "schedule": part.schedule}
                jobs += [{**job, "arch": arch} for arch in archs]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        script = Path(__file__).with_name("cross_compile.py")
        done = subprocess.run([sys.executable, str(script)], input=json.dumps(jobs), env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise LoweringError(f"the process that compiles kernels failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    binaries: dict[tuple[str, str], Binary | str] = {}
    for found in json.loads(done.stdout.splitlines()[-1]):
        if "no_backend" in found:
            raise TargetError(f"the installed triton cannot compile for {found['arch']}: {found['no_backend']}")
        binaries[found["kernel"], found["arch"]] = _binary(found)
    return {(kernel.name, arch): _joined(kernel, arch, binaries) for kernel in kernels for arch in archs}


def _binary(found: dict[str, Any]) -> Binary | str:
    if "error" in found:
        return f"{found['kernel']} does not compile for {found['arch']}: {found['error']}"
    return Binary(found["arch"], found["registers"], found["spills"], found["shared_bytes"], b64decode(found["binary"]))


def _joined(kernel: Kernel, arch: str, binaries: dict[tuple[str, str], Binary | str]) -> Binary | str:
    """The binary of a kernel with those of its other functions; the first sentence of one that does not compile."""
    made: list[Binary] = []
    for name in (kernel.name, *(part.name for part in kernel.parts)):
        binary = binaries[name, arch]
        if isinstance(binary, str):
            return binary
        made.append(binary)
    most = {name: max(getattr(binary, name) for binary in made) for name in ("registers", "spills", "shared_bytes")}
    return replace(made[0], parts=tuple(made[1:]), **most)
