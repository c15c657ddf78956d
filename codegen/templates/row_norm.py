"""Layer norm and RMS norm over rows, with the elementwise ops before and after them.

Types: f16, bf16, f32 (computed in f32) and f64. Reads each operand once, among them a residual, per-row and per-channel values; writes the normalised
rows and, where others use it, the sum that was normalised. One program a row, the row in registers: at most 16,384 columns. Shared memory: one partial
sum per warp. Sources: Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Any

from paretorch.codegen.kernel import KernelTemplate, Region
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import is_op

LONGEST_ROW = 16384


def norm_of(region: Region) -> Any:
    """The node that normalises."""
    return next(node for node in region.nodes if is_op(node, "layer_norm", "rms_norm"))


def legal(region: Region) -> str | None:
    norm = norm_of(region)
    given = arguments(norm)
    width = shape_of(norm)[-1]
    if len(given["normalized_shape"]) != 1:
        return f"{norm.name} normalises the last {len(given['normalized_shape'])} axes; the template takes the last one"
    if not isinstance(width, int):
        return f"the rows of {norm.name} have length {width}; the template takes a fixed one"
    if width > LONGEST_ROW:
        return f"a row of {width} is longer than one block ({LONGEST_ROW})"
    if any(shape_of(node) != shape_of(norm) for node in region.nodes):
        return f"not all of its values have the shape of {norm.name}, {list(shape_of(norm))}"
    if given["eps"] is None:
        return f"{norm.name} takes its eps from its dtype; the template takes a number"
    return None


def schedules(width: int | None) -> tuple[dict[str, int], ...]:
    """The whole row in one block, 16 elements a thread; then with half and twice as many warps."""
    assert width is not None  # rows have a fixed length
    block = 1 << max(4, (width - 1).bit_length())
    warps = min(16, max(1, block // 512))
    return tuple(
        {"BLOCK": block, "num_warps": count} for count in sorted({warps, max(1, warps // 2), min(16, warps * 2)}, key=lambda n: n != warps)
    )


HEAD = """\
@triton.jit
def ${kernel}(${parameters}, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
${coordinates}
${loads}
${before}
"""
TAIL = """\
${after}
${stores}
"""

LAYER_NORM = KernelTemplate(
    name="layer_norm",
    text=HEAD
    + """\
    mean = tl.sum(tl.where(inside, ${x}, 0.0)) / width
    centred = tl.where(inside, ${x} - mean, 0.0)
    ${y} = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)${affine}
"""
    + TAIL,
    legal=legal,
    schedules=schedules,
)

RMS_NORM = KernelTemplate(
    name="rms_norm",
    text=HEAD
    + """\
    square = tl.where(inside, ${x} * ${x}, 0.0)
    ${y} = ${x} * tl.rsqrt(tl.sum(square) / width + eps)${affine}
"""
    + TAIL,
    legal=legal,
    schedules=schedules,
)
