"""Places in memory: which element of each operand belongs to an element of the result, as text.

The result's axes are grouped into runs over which every operand is either whole or repeated, so that few divisions are left: an operand of the
result's shape is at `place`, a row vector at `place % n1`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Places:
    """sizes: names of sizes that the text uses, each with the result's axes whose product it is; lines: text that computes coordinates;
    offsets: for each operand the text of its element's offset, "" if it has one element only."""

    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    lines: tuple[str, ...]
    offsets: tuple[str, ...]


def places(result: Sequence[Any], operands: Sequence[Sequence[Any]], position: str = "place") -> Places:
    """Offsets of operands that broadcast to the result. position: the name of the flat number of the result's element."""
    held = [_held(result, shape) for shape in operands]
    groups = _groups(result, held)
    names = [f"n{number}" for number in range(len(groups))]
    has = [[axes[group[0]] for group in groups] for axes in held]
    offsets = [position if all(row) and row else _offset(row, names) for row in has]
    needed = {number for row in has if not all(row) for number, present in enumerate(row) if present}
    lines = [_coordinate(number, names, position) for number in sorted(needed)]
    text = " ".join([*(line.split(" = ")[1] for line in lines), *offsets])
    sizes = tuple((name, tuple(group)) for name, group in zip(names, groups, strict=True) if re.search(rf"\b{name}\b", text))
    return Places(sizes, tuple(lines), tuple(offsets))


def _held(result: Sequence[Any], shape: Sequence[Any]) -> list[bool]:
    """For each axis of the result whether the operand has it; axes of length one count as repeated."""
    lead = len(result) - len(shape)
    return [axis >= lead and size != 1 and shape[axis - lead] == size for axis, size in enumerate(result)]


def _groups(result: Sequence[Any], held: Sequence[Sequence[bool]]) -> list[list[int]]:
    """Runs of axes over which all operands behave alike, without axes of length one."""
    groups: list[list[int]] = []
    for axis, size in enumerate(result):
        if size == 1:
            continue
        if groups and all(axes[groups[-1][-1]] == axes[axis] for axes in held):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _coordinate(number: int, names: Sequence[str], position: str) -> str:
    """ "at_n1 = place // n2 % n1"."""
    inner = names[number + 1 :]
    outer = f" % {names[number]}" if number > 0 else ""
    divided = "" if not inner else f" // {inner[0]}" if len(inner) == 1 else f" // ({' * '.join(inner)})"
    return f"at_{names[number]} = {position}{divided}{outer}"


def _offset(has: Sequence[bool], names: Sequence[str]) -> str:
    """Row-major offset over the groups that the operand has."""
    kept = [name for name, present in zip(names, has, strict=True) if present]
    return " + ".join(" * ".join([f"at_{name}", *kept[number + 1 :]]) for number, name in enumerate(kept))
