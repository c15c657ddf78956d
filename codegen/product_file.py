"""The file of a product's kernel: its text, its launches, the same in torch, and how much it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from torch.fx import Node

from paretorch.codegen.attention_text import lines
from paretorch.codegen.coordinates import plus, product, times
from paretorch.codegen.expressions import LANGUAGE_TYPES, TRITON_TYPES, dtype_of
from paretorch.codegen.kernel import Region, Schedule
from paretorch.codegen.kernel_file import prepared, symbol_lines, torch_line, wrapped
from paretorch.codegen.layouts import layout_of
from paretorch.codegen.product import INNER, PLAIN, ROWS, Fused, Sum, joins, operands_of, refuses
from paretorch.codegen.schedules import FEW_ROWS, OF_A_UNIT, programs_of
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.templates.product import BAND, PRODUCT
from paretorch.codegen.triton_offsets import coordinates, wide
from paretorch.codegen.whole_op import Built, Effort, WholeOp, stride_kind
from paretorch.ir.ops import op_of
from paretorch.ir.ops.costs import value_type
from paretorch.ir.ops.quantized import ZERO

# shares of the rate of the vendor's product: assumed, since nothing was measured. Where x is computed its blocks are not loaded ahead, which counts
# where many rows keep the matrix units busy.
RATE, COMPUTED_RATE = 0.7, 0.4
UNPACKED = f"tl.join({{right}} & 15, {{right}} >> 4).permute(0, 2, 1).reshape(BLOCK_INNER, BLOCK_COLUMNS).to(tl.int8) - {ZERO}"


def goes_first(node: Node) -> bool:
    """Where torch would widen the weight in every call; plain products are the vendor's."""
    return operands_of(node).scale is not None


def effort(region: Region) -> Effort:
    """The flops of every sum, each value read or written once, and what is computed beside: before the product once for each block of columns."""
    fused = Fused(region)
    schedule, rows = fused.schedules[0], product(region.shape[:-1])
    blocks = -(-fused.columns // schedule["BLOCK_COLUMNS"])
    light: Any = 0
    for emitter, times_computed in ((fused.before(is_whole=False), blocks), (fused.after, 1)):
        for node, count in emitter.evaluations.items():
            own = op_of(node)
            if own is not None and node not in emitter.layouts and node not in fused.products:
                light += own.flops(node) * count * times_computed
    moved = sum(value_type(node).nbytes for node in (*region.reads, *region.writes))  # type: ignore[union-attr]
    is_few = schedule["BLOCK_ROWS"] <= FEW_ROWS
    return Effort(
        2 * rows * fused.given.inner * fused.columns * len(fused.sums), moved, rate=RATE if is_few or fused.given.x in region.reads else COMPUTED_RATE,
        light_flops=light, programs=programs_of(schedule, rows, fused.columns), of_a_unit=OF_A_UNIT["few" if is_few else "many"],
    )  # fmt: skip


def build(region: Region, kernel: str, schedule: Schedule | None = None) -> Built:
    """The file's parts for a region of products of one x and what goes along with them."""
    fused = Fused(region)
    schedule = schedule or fused.schedules[0]
    arguments = arguments_of(fused)
    text = device_text(fused, kernel, arguments, schedule, rest_of(fused))
    return Built(text, parameters_of(arguments), schedule, fused.names, _launches(fused, kernel, schedule), reference(fused))


@dataclass(frozen=True)
class Argument:
    """Of a device function. kind: its Triton type; text: what the launcher gives for it."""

    name: str
    kind: str
    text: str


def arguments_of(fused: Fused) -> list[Argument]:
    """Of a kernel that computes all of the region."""
    region, names = fused.region, fused.names
    pointers = [Argument(f"{names[node]}_ptr", f"*{TRITON_TYPES[dtype_of(node)]}", names[node]) for node in (*region.reads, *region.writes)]
    strides = [
        Argument(name, stride_kind(layout.known[axis]).replace("i32", "i64"), f"{names[node]}.stride({axis})")
        for node, layout in fused.after.layouts.items()
        for name, axis in layout.parameters
    ]
    symbols = [Argument(symbol, "i64", symbol) for symbol, _ in symbols_of(region)]
    return [*pointers, *strides, *symbols, Argument("rows", "i32", "rows")]


def parameters_of(arguments: Sequence[Argument]) -> tuple[tuple[str, str], ...]:
    return tuple((argument.name, argument.kind) for argument in arguments)


def head_of(arguments: Sequence[Argument], options: Schedule) -> str:
    """The parameters of a device function, as its own lines."""
    listed = [f"{argument.name}: tl.int64" if argument.kind.startswith("i64") else argument.name for argument in arguments]
    return wrapped(", ".join([*listed, *(f"{name}: tl.constexpr" for name in options if name.isupper())]))


def rest_of(fused: Fused) -> list[str]:
    """The lines that make what is written of whole sums."""
    after = [*fused.after.conditions, *(str(line) for line in fused.after.lines)]
    whole = [one for one in fused.sums if one.given.scale is not None and one.given.groups == 1]
    return [
        *(f"total{one.end} = total{one.end} * {_scale(fused, one, '')}" for one in whole),
        *after,
        *(
            f"tl.store({fused.names[node]}_ptr + {times('row', fused.columns)} + column, {fused.after.write(node)}, mask=in_rows & in_columns)"
            for node in fused.region.writes
        ),
    ]


def device_text(fused: Fused, kernel: str, arguments: Sequence[Argument], schedule: Schedule, rest: Sequence[str]) -> str:
    """The device function that takes the sums. rest: what it does with them; each program takes one of SPLITS parts of K, if the schedule has them."""
    given = fused.given
    block, length = schedule["BLOCK_INNER"], given.inner // given.groups
    parts, is_whole = -(-length // block), length % block == 0
    within, steps = "within" if given.groups > 1 else "along", given.groups * parts
    left = _left(fused, is_whole=is_whole)
    return filled(
        PRODUCT,
        kernel=kernel,
        parameters=head_of(arguments, schedule),
        columns=fused.columns,
        band=BAND,
        wide=wide(fused.region),
        coordinates=lines(coordinates(fused.after, " ".join([*left, *rest]))),
        totals=totals(fused),
        share=lines(_share(steps)) if "SPLITS" in schedule else "",
        steps=f"begin, tl.minimum(begin + share, {steps})" if "SPLITS" in schedule else f"0, {steps}",
        along=lines(_along(given.groups, parts, length, is_whole=is_whole), 2),
        depth="along" if not given.is_packed else "(step * (BLOCK_INNER // 2) + tl.arange(0, BLOCK_INNER // 2))",
        edges="" if is_whole else f"        in_inner, in_depth = ({within} < {length})[None, :], ({within} < {length})[:, None]",
        left=lines(left, 2),
        right=lines([_right(fused, one, is_whole=is_whole) for one in fused.sums], 2),
        sum=lines([line for one in fused.sums for line in _sum(fused, one, parts)], 2),
        rest=lines(rest),
    )


def filled(template: str, **slots: Any) -> str:
    """A template's text; lines that a slot leaves empty between its first and its last are dropped."""
    before, name, rest = Template(template).substitute(slots).partition("@triton.jit\n")
    return before + name + "\n".join(line for line in rest.splitlines() if line.strip()) + "\n"


def totals(fused: Fused) -> str:
    """The lines that begin the sums."""
    return lines([f"total{one.end} = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)" for one in fused.sums])


def _share(steps: int) -> list[str]:
    """Which part of K a program takes."""
    return [f"split, share = tl.program_id(1), tl.cdiv({steps}, SPLITS)", "begin = split * share"]


def _along(groups: int, parts: int, length: int, *, is_whole: bool) -> list[str]:
    """Where along K a block lies; a group that blocks do not divide begins a new one."""
    if is_whole or groups == 1:
        return ["along = step * BLOCK_INNER + tl.arange(0, BLOCK_INNER)"]
    return [
        f"within = step % {parts} * BLOCK_INNER + tl.arange(0, BLOCK_INNER)",
        f"along = step // {parts} * {length} + within",
    ]


def _left(fused: Fused, *, is_whole: bool) -> list[str]:
    """The lines that make `left`, the block of x: read as it lies, or computed in f32 and rounded to its type."""
    emitter, x = fused.before(is_whole=is_whole), fused.given.x
    masks = "in_rows" if is_whole else "in_rows & in_inner"
    if x in fused.region.reads:
        dense = f"{times('row', fused.given.inner)} + inner"  # for one row, or one column, too
        offset = dense if emitter.layouts[x].is_contiguous else emitter.offset(x, emitter.space.at)
        if all(re.search(pattern, offset) for pattern, _ in (ROWS, INNER)):
            return [f"left = tl.load({fused.names[x]}_ptr + {offset}, mask={masks}, other=0.0)"]
    name = emitter.value(x, emitter.space.at)
    computed = [*emitter.conditions, *(str(line) for line in emitter.lines)]
    return [*computed, f"left = tl.where({masks}, {name}, 0.0).to({LANGUAGE_TYPES[dtype_of(x)]})"]


def _right(fused: Fused, one: Sum, *, is_whole: bool) -> str:
    """The load of a block [BLOCK_INNER, BLOCK_COLUMNS] of a weight, or of half as many rows of one that is packed."""
    given, name = one.given, fused.names[one.given.weight]
    if given.is_packed:
        offset = plus(times(one.column, given.inner // 2), "depth")
        return f"right{one.end} = tl.load({name}_ptr + {offset}, mask=in_columns, other=0)"
    at = ("depth", one.column) if given.is_turned else (one.column, "depth")
    strides = layout_of(given.weight, name).strides
    offset = plus(*(times(text, stride) for text, stride in zip(at, strides, strict=True)))
    return f"right{one.end} = tl.load({name}_ptr + {offset}, mask=in_columns{'' if is_whole else ' & in_depth'}, other=0)"


def _scale(fused: Fused, one: Sum, group: str) -> str:
    scale = one.given.scale
    assert scale is not None  # asked by the callers
    name = fused.names[scale]
    offset = plus(*(times(text, stride) for text, stride in zip((one.column, group), layout_of(scale, name).strides, strict=True)))
    return f"tl.load({name}_ptr + {offset}, mask=in_columns, other=0.0).to(tl.float32)"


def _sum(fused: Fused, one: Sum, parts: int) -> list[str]:
    """How a block's products are added: as they are, or times the scale of their group."""
    right, total = f"right{one.end}", f"total{one.end}"
    unpacked = [f"{right} = {UNPACKED.format(right=right)}"] if one.given.is_packed else []
    if one.given.scale is not None:
        right = f"{right}.to(left.dtype)"
    if one.given.groups == 1:
        return [*unpacked, f'{total} = tl.dot(left, {right}, {total}, input_precision="ieee")']
    group = "step" if parts == 1 else f"(step // {parts})"
    return [
        *unpacked,
        f'part = tl.dot(left, {right}, input_precision="ieee")',
        f"{total} += part * {_scale(fused, one, group)}",
    ]


def _launches(fused: Fused, kernel: str, schedule: Schedule) -> tuple[str, ...]:
    columns, first = fused.columns, fused.names[fused.region.writes[0]]
    found, chosen = begun(fused), "SCHEDULE"
    if fused.rows is None:
        few = ", ".join(f'"{key}": {value}' for key, value in fused.schedules_for(FEW_ROWS)[0].items())
        found += [f"few = {{{few}}}", f"schedule = SCHEDULE if rows > {FEW_ROWS} else few"]
        chosen = "schedule"
    return (
        *found,
        f"if {first}.numel() > 0:",
        f'    programs = triton.cdiv(rows, {chosen}["BLOCK_ROWS"]) * triton.cdiv({columns}, {chosen}["BLOCK_COLUMNS"])',
        *call(kernel, "programs,", arguments_of(fused), f"**{chosen}"),
    )


def begun(fused: Fused) -> list[str]:
    """The first lines of a launcher: operands as they are read, room for results, the number of rows."""
    first = fused.names[fused.region.writes[0]]
    return [*prepared(fused.region, fused.after, symbols_of(fused.region)), f"rows = {first}.numel() // {fused.columns}"]


def call(kernel: str, grid: str, arguments: Sequence[Argument], options: str) -> list[str]:
    """The launch of a device function."""
    given = ", ".join([*(argument.text for argument in arguments), options])
    return [f"    {kernel}[({grid})](", *wrapped(given, 2).splitlines(), "    )"]


def reference(fused: Fused) -> tuple[str, ...]:
    """Every node as a call of torch, products in f32 with a weight that is multiplied out."""
    region, names, given = fused.region, fused.names, fused.given
    found = symbol_lines(symbols_of(region), [names[node] for node in region.reads])
    for node in region.nodes:
        found += _product_lines(fused, node) if node in fused.products else [torch_line(node, names)]
    half = [node for node in region.writes if dtype_of(node) == "bf16"]
    found += [f"{names[node]} = {names[node]}.to(torch.bfloat16)" for node in half if dtype_of(given.x) == "bf16"]
    return tuple(found)


def _product_lines(fused: Fused, node: Node) -> list[str]:
    given, names = fused.products[node], fused.names
    weight = f"{names[given.weight]}{'.t()' if given.is_turned else ''}.float()"
    found = []
    if given.is_packed:
        name = names[given.weight]
        found.append(f"unpacked = torch.stack(({name} & 15, {name} >> 4), 3).reshape({given.columns}, {given.inner})")
        weight = f"(unpacked.float() - {ZERO})"
    if given.scale is not None:
        shape = (given.columns, given.groups, given.inner // given.groups)
        found.append(f"wide = ({weight}.reshape{shape} * {names[given.scale]}.float()[:, :, None]).reshape({shape[0]}, {given.inner})")
        weight = "wide"
    bias = f", {names[given.bias]}.float()" if given.bias is not None else ""
    x = names[given.x]
    return [*found, f"{names[node]} = torch.nn.functional.linear({x}.float(), {weight}{bias}).to({x}.dtype)"]


PRODUCTS = WholeOp(PLAIN, refuses, goes_first, effort, lambda region: Fused(region).schedules, build, joins)
