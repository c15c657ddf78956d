"""A chain of elementwise ops in one kernel: each operand read once, each result written once, everything between in registers.

Types: any; half precision is computed in f32. Operands broadcast to the results, which have one shape. No shared memory.
A program takes BLOCK elements; the last one is masked, so any number of elements will do.
"""

from __future__ import annotations

from paretorch.codegen.kernel import KernelTemplate, Region
from paretorch.ir.graph import shape_of


def legal(region: Region) -> str | None:
    shapes = {shape_of(node) for node in region.nodes}
    if len(shapes) > 1:
        return f"its values have several shapes: {', '.join(sorted(str(list(shape)) for shape in shapes))}"
    return None


ELEMENTWISE = KernelTemplate(
    name="elementwise",
    text="""\
@triton.jit
def ${kernel}(${parameters}, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
${coordinates}
${loads}
${body}
${stores}
""",
    legal=legal,
    schedules=lambda width: ({"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 512, "num_warps": 4}),
)
