"""Products of few rows with K divided between programs: two device functions, the parts of the sums and what adds them up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from paretorch.codegen.attention_text import lines
from paretorch.codegen.coordinates import plus, times
from paretorch.codegen.kernel import Part, Region, Schedule
from paretorch.codegen.product import SPLIT, Fused, joins, refuses
from paretorch.codegen.product_file import (
    Argument,
    arguments_of,
    begun,
    call,
    device_text,
    effort,
    filled,
    goes_first,
    head_of,
    parameters_of,
    reference,
    rest_of,
    totals,
)
from paretorch.codegen.templates.split_product import SUM
from paretorch.codegen.triton_offsets import coordinates, wide
from paretorch.codegen.whole_op import Built, Effort, WholeOp

ADDED = {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 128, "num_warps": 2}  # results that a program of the second function makes
PARTS = Argument("part_ptr", "*fp32", "part")


def split_effort(region: Region) -> Effort:
    """As one kernel's, and the parts of the sums, which are written and read once."""
    fused, whole = Fused(region), effort(region)
    parts = fused.schedules[0]["SPLITS"] * len(fused.sums) * (fused.rows or 0) * fused.columns
    return replace(whole, bytes_moved=whole.bytes_moved + 2 * 4 * parts, launches=2)


def build(region: Region, kernel: str, schedule: Schedule | None = None) -> Built:
    """The file's parts for a region of products of few rows and what goes along with them."""
    fused = Fused(region)
    schedule = schedule or fused.schedules[0]
    options = {**ADDED, "SPLITS": schedule["SPLITS"]}
    every = [PARTS, *arguments_of(fused)]
    first = _used(every, device_text(fused, kernel, every, schedule, _stores(fused)))
    second = _used(every, _sum_text(fused, kernel, every, options))
    text = device_text(fused, kernel, first, schedule, _stores(fused)) + _sum_text(fused, kernel, second, options)
    launches = _launches(fused, kernel, first, second)
    part = Part(f"{kernel}_sum", parameters_of(second), options)
    return Built(text, parameters_of(first), schedule, fused.names, launches, reference(fused), (part,))


def _used(arguments: Sequence[Argument], text: str) -> list[Argument]:
    """Those that the body of a device function names."""
    body = text.partition("):\n")[2]
    return [argument for argument in arguments if re.search(rf"\b{argument.name}\b", body)]


def _place(fused: Fused, place: int) -> str:
    """Where a part of a sum lies. place: of the sum."""
    number = f"({plus(times('SPLITS', place), 'split')})" if place else "split"
    return f"part_ptr + {times(f'{number} * rows + row', fused.columns)} + column"


def _stores(fused: Fused) -> list[str]:
    return [f"tl.store({_place(fused, place)}, total{one.end}, mask=in_rows & in_columns)" for place, one in enumerate(fused.sums)]


def _sum_text(fused: Fused, kernel: str, arguments: Sequence[Argument], options: Schedule) -> str:
    rest = rest_of(fused)
    parts = [
        f"total{one.end} += tl.load({_place(fused, place)}, mask=in_rows & in_columns, other=0.0)" for place, one in enumerate(fused.sums)
    ]
    return filled(
        SUM,
        kernel=kernel,
        parameters=head_of(arguments, options),
        columns=fused.columns,
        wide=wide(fused.region),
        coordinates=lines(coordinates(fused.after, " ".join(rest))),
        totals=totals(fused),
        parts=lines(parts, 2),
        rest=lines(rest),
    )


def _launches(fused: Fused, kernel: str, first: Sequence[Argument], second: Sequence[Argument]) -> tuple[str, ...]:
    out, columns = fused.names[fused.region.writes[0]], fused.columns
    options = ", ".join(f"{name}={value}" for name, value in ADDED.items())
    size = f'({len(fused.sums)}, SCHEDULE["SPLITS"], rows, {columns})'
    return (
        *begun(fused),
        f"if {out}.numel() > 0:",
        f"    part = torch.empty({size}, dtype=torch.float32, device={out}.device)",
        f'    programs = triton.cdiv(rows, SCHEDULE["BLOCK_ROWS"]) * triton.cdiv({columns}, SCHEDULE["BLOCK_COLUMNS"])',
        *call(kernel, 'programs, SCHEDULE["SPLITS"]', first, "**SCHEDULE"),
        f"    programs = rows * triton.cdiv({columns}, {ADDED['BLOCK_COLUMNS']})",
        *call(f"{kernel}_sum", "programs,", second, f'{options}, SPLITS=SCHEDULE["SPLITS"]'),
    )


SPLIT_PRODUCTS = WholeOp(SPLIT, refuses, goes_first, split_effort, lambda region: Fused(region).schedules, build, joins)
