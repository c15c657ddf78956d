"""Ops over rows that are longer than a block: a pass over the row for each statistic, and one that writes.

What a pass needs is read and computed again, so that nothing of the row is held between passes; a second read mostly comes from the cache.
Types, reads and writes as in the template `row`. Shared memory: one partial result per warp. Source: as there.
"""

from __future__ import annotations

from paretorch.codegen.kernel import KernelTemplate, Schedule

BLOCK = 4096


def schedules(width: int | None, held: int) -> tuple[Schedule, ...]:
    """Sixteen elements a thread, or fewer where many values are held at once; then blocks of half and twice the size."""
    first = 8 if held <= 4 else 16
    return tuple(
        {"BLOCK": block, "num_warps": warps} for block, warps in ((BLOCK, first), (BLOCK, 24 - first), (BLOCK // 2, 8), (2 * BLOCK, 16))
    )


PASS = """\
    ${steps} = tl.full([BLOCK], ${identity}, ${type})
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
${lines}
        ${steps} = ${combined}
    ${name} = tl.${function}(${steps})${divided}
"""

LONG_ROW = KernelTemplate(
    name="long_row",
    text="""\
@triton.jit
def ${kernel}(${parameters}, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
${coordinates}
${passes}
${numbers}
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
${lines}
${stores}
""",
    schedules=schedules,
)
