"""Symbolic sizes of a region: the arguments that a kernel gets for them, and where its launcher reads them."""

from __future__ import annotations

import sympy

from paretorch.codegen.expressions import dtype_of
from paretorch.codegen.kernel import Region
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import shape_of


def symbols_of(region: Region) -> list[tuple[str, str]]:
    """(symbol, launcher's text for it) of the symbolic sizes. Raises LoweringError for one that is no axis of what is read."""
    sizes = [size for node in (*region.nodes, *region.reads) if dtype_of(node) for size in shape_of(node)]
    free = sorted({symbol for size in sizes if not isinstance(size, int) for symbol in size.free_symbols}, key=str)
    return [(str(symbol), _symbol_text(symbol, region)) for symbol in free]


def _symbol_text(symbol: sympy.Symbol, region: Region) -> str:
    """ "{0}.shape[1]", with the place of the read whose axis has this size."""
    for place, node in enumerate(region.reads):
        for axis, size in enumerate(shape_of(node)):
            if size == symbol:
                return f"{{{place}}}.shape[{axis}]"
    raise LoweringError(f"the size {symbol} is no axis of what is read, so the launcher cannot tell it")
