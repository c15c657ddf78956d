"""Schedules of templates that hold blocks of products: sizes that the registers and the shared memory of every architecture hold.

A thread holds its shares of the blocks of scores, of results and of queries, in registers. `HELD` says how many of these did not spill on any of
sm_80, sm_90 and gfx942 when cross-compiled with triton 3.7 (2026-11-21): fewer where more is done between the products, since operands are then
held beside them, and fewer in f32, whose products NVIDIA's compilers unroll.

ptxas keeps a few values in memory, at 72 or 168 registers as it may be, where one register less lets another block of threads run. A kernel that says
how many registers it may have at most is not treated so: f16 heads of width 64 with a key bias spilled 24 bytes at 168 and none at 186, f32 heads of
that width with lengths 8 bytes at 80 on sm_90 (2026-11-22).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paretorch.codegen.kernel import Schedule

SHARED_BYTES = 64 * 1024  # of gfx942, the least of the three
HALF_BLOCKS = ((128, 64, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4), (16, 64, 4), (32, 16, 4), (16, 32, 4), (16, 16, 4))
FULL_BLOCKS = ((32, 16, 4), (16, 16, 4))
BOLD_HALF = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))  # (rows, keys, warps, stages) for chips with more of both
BOLD_FULL = ((64, 32, 8, 2), (32, 32, 4, 2))
SAFE = 4  # of those that every architecture holds, that are tried where schedules are timed
HELD = {
    ("half", "light"): 128,
    ("half", "biased"): 128,
    ("half", "heavy"): 96,
    ("full", "light"): 40,
    ("full", "biased"): 40,
    ("full", "heavy"): 40,
}
ALL_REGISTERS = {"maxnreg": 255}  # NVIDIA's most for a thread; other compilers are not told


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller, and at least 16: what a product of blocks takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def attention_schedules(
    itemsize: int, width: int, value_width: int, rows: int | None, keys: int | None, *, form: str
) -> tuple[Schedule, ...]:
    """The block sizes that fit every architecture, the best first, then some that may spill on a part of them: to be tried where that is looked at.

    rows, keys: None if they vary; form: what is done to scores: "light" for a factor, "biased" for a number or a page of each key, "heavy" for more.
    """
    widths = {"BLOCK_WIDTH": power_of_two(width), "BLOCK_VALUE": power_of_two(value_width)}
    widest_rows = most_rows = 128 if rows is None else power_of_two(rows)
    widest_keys = most_keys = 128 if keys is None else power_of_two(keys)
    if form != "light":  # AMD keeps a truth for each score in a pair of scalar registers
        most_keys = min(most_keys, 32)
    if form != "light" and max(width, value_width) > 128:
        most_rows = most_keys = 16
    if form == "biased":
        most_rows = min(most_rows, 64)
    precision = "half" if itemsize < 4 else "full"
    stages = 1 if form == "heavy" and max(width, value_width) <= 16 else 2  # so little is loaded that there is nothing to wait for
    limit = {} if (precision, form) == ("half", "light") else ALL_REGISTERS
    found = []
    for block_rows, block_keys, warps in HALF_BLOCKS if precision == "half" else FULL_BLOCKS:
        options = {"BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys, **widths, "num_warps": warps, "num_stages": stages, **limit}
        small = block_rows <= most_rows and block_keys <= most_keys
        held = attention_held(options, itemsize)
        if small and held <= HELD[precision, form] and attention_shared(options, itemsize) <= SHARED_BYTES:
            found.append(options)
    safe = found[:SAFE] or [{"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, **widths, "num_warps": 4, "num_stages": 1, **limit}]
    bold = [
        {"BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys, **widths, "num_warps": warps, "num_stages": stages, **limit}
        for block_rows, block_keys, warps, stages in (BOLD_HALF if precision == "half" else BOLD_FULL)
        if block_rows <= widest_rows and block_keys <= widest_keys
    ]
    return (*safe, *bold)


def attention_held(options: Schedule, itemsize: int) -> int:
    """Registers of a thread for scores, their powers, the results so far and the queries."""
    rows, keys = options["BLOCK_ROWS"], options["BLOCK_KEYS"]
    shares = rows * (2 * keys + options["BLOCK_VALUE"]) + rows * options["BLOCK_WIDTH"] * itemsize // 4
    return shares // (32 * options["num_warps"])


def attention_shared(options: Schedule, itemsize: int) -> int:
    """Bytes of the keys and values of one stage, and of the queries: what AMD's pipeline holds."""
    keys = options["BLOCK_KEYS"] * (options["BLOCK_WIDTH"] + options["BLOCK_VALUE"])
    return (keys + options["BLOCK_ROWS"] * options["BLOCK_WIDTH"]) * itemsize


FEW_ROWS = 16
LEAST_BLOCK = 16  # of a product, along K
PRODUCT_BLOCKS = {  # (rows, columns, along K, warps, stages), from wide to narrow; narrower ones where more is held beside the sums
    ("half", "many"): (
        (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (32, 32, 64, 4, 3), (32, 16, 64, 2, 3),
    ),
    ("half", "few"): ((16, 64, 64, 4, 5), (16, 32, 64, 4, 4), (16, 16, 64, 2, 8)),
    ("full", "many"): ((32, 32, 32, 4, 3), (32, 16, 32, 4, 3)),
    ("full", "few"): ((16, 32, 32, 8, 4), (16, 16, 32, 2, 4)),
}  # fmt: skip
GATE_BLOCKS = {  # of a program with two sums, each of so many columns
    ("half", "many"): ((128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (32, 16, 64, 4, 3)),
    ("half", "few"): ((16, 32, 64, 4, 5), (16, 16, 64, 2, 8)),
    ("full", "many"): ((32, 16, 32, 4, 3),),
    ("full", "few"): ((16, 16, 32, 2, 4),),
}
OF_A_UNIT = {"many": 1, "few": 2}  # programs that keep one busy: where they wait for memory two; assumed, not measured
CHIP = {form: 132 * programs for form, programs in OF_A_UNIT.items()}  # programs that fill one: of the 132 units of an H100
BESIDE_SCALED = (
    3  # for each sum that of a group, and room for its scales: the widest blocks spilled in f16 on sm_90, two sums in bf16 on sm_80
)
HELD_BESIDE = 256  # numbers of a thread for sums and what is computed of them
MOST_SPLITS, LEAST_STEPS = 16, 4  # parts of K; blocks along K of a part, so that there is something to load ahead


def product_schedules(
    itemsize: int, rows: int | None, columns: int, length: int, held: int, *, is_scaled: bool, sums: int = 1
) -> tuple[Schedule, ...]:
    """The block sizes of a product that fit, the best first: the widest whose programs fill a chip, or else the narrowest.

    None of them where too much is held. rows: None if they vary; length: of a group of K, which a block does not go beyond; held: values of an
    element that are held at once; sums: how many a program takes, one or two.
    """
    precision, form = "half" if itemsize < 4 else "full", "few" if rows is not None and rows <= FEW_ROWS else "many"
    found: list[Schedule] = []
    filling: list[Schedule] = []
    for block_rows, block_columns, block_inner, warps, stages in (PRODUCT_BLOCKS if sums == 1 else GATE_BLOCKS)[precision, form]:
        inner = min(block_inner, power_of_two(length))
        while is_scaled and inner > LEAST_BLOCK and length % inner:
            inner //= 2
        options = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "BLOCK_INNER": inner, "num_warps": warps, "num_stages": stages}
        if block_rows * block_columns // (32 * warps) * (held + BESIDE_SCALED * sums * is_scaled) <= HELD_BESIDE:
            found.insert(0, options)
            if rows is None or programs_of(options, rows, columns) >= CHIP[form]:
                filling.append(options)
    return (*filling, *(options for options in found if options not in filling))


def programs_of(options: Schedule, rows: Any, columns: int) -> Any:
    """How many programs take a product's rows and columns."""
    return -(-rows // options["BLOCK_ROWS"]) * -(-columns // options["BLOCK_COLUMNS"]) * options.get("SPLITS", 1)


def split_schedules(schedules: Sequence[Schedule], rows: int, columns: int, length: int, groups: int) -> tuple[Schedule, ...]:
    """These with K divided between as many programs as fill a chip, those of the fewest parts first; none where blocks of columns fill it.

    length: of a group of K. Every part has some blocks along K, none is empty.
    """
    if rows > FEW_ROWS or any(programs_of(options, rows, columns) >= CHIP["few"] for options in schedules):
        return ()
    found = []
    for options in schedules:
        steps = groups * -(-length // options["BLOCK_INNER"])
        splits = min(-(-CHIP["few"] // programs_of(options, rows, columns)), MOST_SPLITS, steps // LEAST_STEPS)
        if splits > 1:
            found.append({**options, "SPLITS": -(-steps // -(-steps // splits))})
    return tuple(sorted(found, key=lambda options: options["SPLITS"]))
