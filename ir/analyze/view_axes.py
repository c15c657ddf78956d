"""How a view passes axes on: by the cumulative products of the sizes on both sides.

f32[B, T, C] viewed as [B, T, H, D] splits C into H and D; viewed back, H and D collapse to C. Where the products of both sides do not
line up (24 = 6 x 4 viewed as 4 x 6) the dimensions between two common products become new atoms.
"""

from __future__ import annotations

from collections.abc import Sequence

from paretorch.ir.analyze.atoms import Atoms, Dim, Dims, quotient
from paretorch.ir.types import Size


def view_dims(atoms: Atoms, dims: Sequence[Dim], sizes: Sequence[Size], born: str) -> Dims:
    """The dimensions of a view. dims: of its input; sizes: of its output; born: the node that views."""
    stream = [atom for dim in reversed(dims) for atom in reversed(atoms.resolve(dim))]  # the next atom is the last
    made: Dims = []
    for place, size in enumerate(sizes):
        taken = _take(atoms, stream, size)
        if taken is None:
            return made + _mangled(atoms, stream, sizes[place:], born, all(atoms.weak[atom] for dim in dims for atom in dim))
        made.append(atoms.resolve(taken))
    return made


def _take(atoms: Atoms, stream: list[int], size: Size) -> Dim | None:
    """The outermost atoms whose product is this size, removed from the stream (restored if there are none)."""
    saved, taken, wanted = list(stream), [], size
    while wanted != 1:
        if not stream:
            break
        atom = stream.pop()
        rest = quotient(wanted, atoms.sizes[atom])
        if rest is not None:
            taken.append(atom)
            wanted = rest
            continue
        pair = atoms.split(atom, wanted)
        if pair is None:
            break
        taken.append(pair[0])
        stream.append(pair[1])
        wanted = 1
    if wanted == 1:
        return tuple(taken)
    stream[:] = saved
    return None


def _mangled(atoms: Atoms, stream: list[int], sizes: Sequence[Size], born: str, weak: bool) -> Dims:
    """New atoms from the first dimension that does not line up to the next place where the products agree, then on from there."""
    for count in range(1, len(sizes) + 1):
        trial = list(stream)
        total: Size = 1
        for size in sizes[:count]:
            total = total * size
        taken = _take(atoms, trial, total)
        if taken is not None:
            made = [atoms.dim(size, born, weak=weak) for size in sizes[:count]]
            return made + view_dims(atoms, [tuple(reversed(trial))], sizes[count:], born)
    return [atoms.dim(size, born, weak=weak) for size in sizes]
