"""How kernels number what they read: coordinates of elements as lines, and whether offsets need 64 bits."""

from __future__ import annotations

import re

from paretorch.codegen.coordinates import product
from paretorch.codegen.emission import Emitter
from paretorch.codegen.kernel import Region
from paretorch.ir.graph import shape_of

LARGEST_OFFSET = 2**31 - 2**16  # the last block goes past the end, and must not go past what 32 bits hold


def wide(region: Region) -> str:
    """ ".to(tl.int64)" unless every offset surely fits into 32 bits; strides are 64-bit arguments anyway."""
    sizes = [product(shape_of(node)) for node in (*region.reads, *region.writes)] + [product(region.shape)]
    return "" if all(isinstance(size, int) and size <= LARGEST_OFFSET for size in sizes) else ".to(tl.int64)"


def coordinates(emitter: Emitter, used: str) -> list[str]:
    """The lines of those coordinates that are used."""
    return [f"{name} = {text}" for name, text in emitter.space.lines.items() if re.search(rf"\b{name}\b", used)]
