"""Ops over rows (softmax, norms, sums, extremes) with the elementwise ops before, between and after them, a row at a time in registers.

Types: f16, bf16, f32 (computed in f32) and f64. Reads each operand once, among them residuals, per-row and per-channel values, of any strides; writes
rows, and one number a row for reductions. At most 16,384 columns. Shared memory: one partial result per warp.
Sources: Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from paretorch.codegen.kernel import KernelTemplate, Schedule

LONGEST_ROW = 16384
REGISTERS = 128  # a thread's values that are held at the same time, at most
MOST_WARPS = 16


def schedules(width: int | None, held: int) -> tuple[Schedule, ...]:
    """The whole row in one block, 16 elements a thread or fewer where many values are held at once; then with half and twice as many warps."""
    assert width is not None  # rows have a fixed length
    block = 1 << max(4, (width - 1).bit_length())
    warps = min(MOST_WARPS, max(1, block // 512))
    while warps < MOST_WARPS and block // (32 * warps) * held > REGISTERS:
        warps *= 2
    counts = (warps, max(1, warps // 2), min(MOST_WARPS, warps * 2))
    return tuple({"BLOCK": block, "num_warps": count} for count in dict.fromkeys(counts))


ROW = KernelTemplate(
    name="row",
    text="""\
@triton.jit
def ${kernel}(${parameters}, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
${coordinates}
${loads}
${body}
${stores}
""",
    schedules=schedules,
)
