"""A chain of elementwise ops in one kernel, seen through views and concatenations: each operand read once an element, results written once.

Types: any that Triton has; half precision is computed in f32. Operands broadcast to the results, which have one shape; rotary embeddings, gates on the
halves of a packed product and casts are chains of this kind. Reads any strides. No shared memory.
A program takes BLOCK elements; the last one is masked, so any number of elements will do. Offsets have 64 bits where 32 might not do.
"""

from __future__ import annotations

from paretorch.codegen.kernel import KernelTemplate, Schedule

REGISTERS = 128  # a thread's values that are held at the same time, at most


def schedules(width: int | None, held: int) -> tuple[Schedule, ...]:
    """Eight elements a thread, or fewer where many values are held at once, in four, eight and two warps; then half and twice as many elements."""
    per_thread = max(1, min(8, 1 << (REGISTERS // max(held, 1)).bit_length() - 1))
    forms = ((4, per_thread), (8, per_thread), (2, per_thread), (4, max(1, per_thread // 2)), (4, 2 * per_thread))
    return tuple({"BLOCK": 32 * warps * elements, "num_warps": warps} for warps, elements in dict.fromkeys(forms))


ELEMENTWISE = KernelTemplate(
    name="elementwise",
    text="""\
@triton.jit
def ${kernel}(${parameters}, BLOCK: tl.constexpr):
    place = tl.program_id(0)${wide} * BLOCK + tl.arange(0, BLOCK)
    inside = place < ${count}
${coordinates}
${loads}
${body}
${stores}
""",
    schedules=schedules,
)
