"""The static model of schedules: what a compiled kernel takes of a chip's units, told before anything is timed.

occupancy(binary, warps)                  -> the share of a unit's warps that can be in flight at once
schedule_refusal(kernel, binary)          -> None, or why a schedule is not worth timing

A unit is a streaming multiprocessor (NVIDIA) or a compute unit (AMD). Sources: NVIDIA CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability" (8.0, 8.9, 9.0), and the CUDA occupancy calculator for how registers are handed out; AMD "Instinct MI300" CDNA3 ISA guide.
"""

from __future__ import annotations

from dataclasses import dataclass

from paretorch.codegen.kernel import Binary, Kernel
from paretorch.codegen.templates import TEMPLATES
from paretorch.ir.errors import TargetError

LEAST_OCCUPANCY = 0.25  # of kernels that stream: fewer warps do not cover the time that memory takes to answer


@dataclass(frozen=True)
class Unit:
    """Of one unit: warps (of `lanes` threads) and blocks at once; registers: of a lane's register file share, over all warps; register_step: how many
    are handed out at once; shared_bytes: of the unit; block_bytes: the most that one block may have; reserved_bytes: of each block, by the system."""

    lanes: int
    warps: int
    blocks: int
    registers: int
    register_step: int
    most_registers: int
    shared_bytes: int
    block_bytes: int
    reserved_bytes: int
    most_threads: int = 1024
    parts: int = 4  # a warp's registers lie in one of these


UNITS = {
    "sm_80": Unit(32, 64, 32, 2048, 8, 255, 164 * 1024, 163 * 1024, 1024),
    "sm_89": Unit(32, 48, 24, 2048, 8, 255, 100 * 1024, 99 * 1024, 1024),
    "sm_90": Unit(32, 64, 32, 2048, 8, 255, 228 * 1024, 227 * 1024, 1024),
    "gfx942": Unit(64, 32, 32, 2048, 8, 512, 64 * 1024, 64 * 1024, 0),
}


def unit_of(arch: str) -> Unit:
    """Raises TargetError for an unknown architecture."""
    if arch not in UNITS:
        raise TargetError(f"no figures of the units of {arch!r}; known: {', '.join(UNITS)}")
    return UNITS[arch]


def occupancy(binary: Binary, warps: int) -> float:
    """The share of a unit's warps that blocks of so many warps fill; 0 where not one block fits. Raises TargetError for an unknown architecture."""
    unit = unit_of(binary.arch)
    if warps * unit.lanes > unit.most_threads or binary.shared_bytes > unit.block_bytes or binary.registers > unit.most_registers:
        return 0.0
    held = -(-max(binary.registers, 1) // unit.register_step) * unit.register_step
    of_registers = unit.registers // unit.parts // held * unit.parts
    shared = binary.shared_bytes + unit.reserved_bytes
    of_shared = unit.shared_bytes // shared if shared else unit.blocks
    blocks = min(unit.blocks, unit.warps // warps, of_registers // warps, of_shared)
    return blocks * warps / unit.warps


def schedule_refusal(kernel: Kernel, binary: Binary) -> str | None:
    """None if the kernel may be timed with this schedule; otherwise a sentence. Raises TargetError for an unknown architecture."""
    unit, options = unit_of(binary.arch), ", ".join(f"{name}={value}" for name, value in kernel.schedule.items())
    if binary.spills:
        return f"{options} spills {binary.spills} on {binary.arch}"
    if binary.shared_bytes > unit.block_bytes:
        return f"{options} takes {binary.shared_bytes} bytes of shared memory; a block has {unit.block_bytes} on {binary.arch}"
    share = occupancy(binary, kernel.schedule["num_warps"])
    if share == 0.0:
        return f"{options} takes {binary.registers} registers in {kernel.schedule['num_warps']} warps, which no unit of {binary.arch} has"
    if kernel.template in TEMPLATES and share < LEAST_OCCUPANCY:
        return f"{options} keeps {share:.0%} of the warps of {binary.arch} in flight; a kernel that streams needs {LEAST_OCCUPANCY:.0%}"
    return None
