"""The file of a product's kernel: its text, its launches, the same in torch, and how much it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Template
from typing import Any

from torch.fx import Node

from paretorch.codegen.attention_text import lines
from paretorch.codegen.coordinates import plus, times
from paretorch.codegen.expressions import LANGUAGE_TYPES, TRITON_TYPES, dtype_of
from paretorch.codegen.kernel import Region, Schedule
from paretorch.codegen.kernel_file import prepared, symbol_lines, torch_line, wrapped
from paretorch.codegen.layouts import layout_of
from paretorch.codegen.product import INNER, ROWS, Fused, joins, operands_of, refuses
from paretorch.codegen.schedules import FEW_ROWS
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.templates.product import BAND, PRODUCT
from paretorch.codegen.triton_offsets import coordinates, wide
from paretorch.codegen.whole_op import Built, Effort, WholeOp, stride_kind
from paretorch.ir.ops import op_of
from paretorch.ir.ops.costs import value_type

# shares of the rate of the vendor's product: assumed, since nothing was measured. Where x is computed its blocks are not loaded ahead, which counts
# where many rows keep the matrix units busy.
RATE, COMPUTED_RATE = 0.7, 0.4


def goes_first(node: Node) -> bool:
    """Where torch would widen the weight in every call; plain products are the vendor's."""
    return operands_of(node).scale is not None


def effort(region: Region) -> Effort:
    """The product's own flops, each value read or written once, and what is computed beside: before it once for each block of columns."""
    fused = Fused(region)
    op = op_of(fused.node)
    assert op is not None  # a node of a row of the table
    blocks = -(-fused.given.columns // fused.schedules[0]["BLOCK_COLUMNS"])
    light: Any = 0
    for emitter, times_computed in ((fused.before(is_whole=False), blocks), (fused.after, 1)):
        for node, count in emitter.evaluations.items():
            own = op_of(node)
            if own is not None and node not in emitter.layouts:
                light += own.flops(node) * count * times_computed
    moved = sum(value_type(node).nbytes for node in (*region.reads, *region.writes))  # type: ignore[union-attr]
    is_read_ahead = fused.given.x in region.reads or fused.schedules[0]["BLOCK_ROWS"] <= FEW_ROWS
    return Effort(op.flops(fused.node), moved, rate=RATE if is_read_ahead else COMPUTED_RATE, light_flops=light)


def build(region: Region, kernel: str, schedule: Schedule | None = None) -> Built:
    """The file's parts for a region of one product and what goes along with it."""
    fused = Fused(region)
    schedule = schedule or fused.schedules[0]
    names = fused.names
    pointers = [(f"{names[node]}_ptr", f"*{TRITON_TYPES[dtype_of(node)]}") for node in (*region.reads, *region.writes)]
    strides = [
        (name, stride_kind(layout.known[axis]).replace("i32", "i64"))
        for layout in fused.after.layouts.values()
        for name, axis in layout.parameters
    ]
    symbols = symbols_of(region)
    parameters = (*pointers, *strides, *((symbol, "i64") for symbol, _ in symbols), ("rows", "i32"))
    text = _text(fused, kernel, parameters, schedule)
    return Built(text, parameters, schedule, names, _launches(fused, kernel, schedule), _reference(fused, symbols))


def _text(fused: Fused, kernel: str, parameters: Sequence[tuple[str, str]], schedule: Schedule) -> str:
    given, region = fused.given, fused.region
    block, length = schedule["BLOCK_INNER"], given.inner // given.groups
    parts, is_whole = -(-length // block), length % block == 0
    within = "within" if given.groups > 1 else "along"
    after = [*fused.after.conditions, *(str(line) for line in fused.after.lines)]
    if given.scale is not None and given.groups == 1:
        after = [f"total = total * {_scale(fused, '')}", *after]
    stores = [
        f"tl.store({fused.names[node]}_ptr + {_place(fused)}, {fused.after.write(node)}, mask=in_rows & in_columns)"
        for node in region.writes
    ]
    left = _left(fused, is_whole=is_whole)
    used = " ".join([*left, *after])
    listed = [f"{name}: tl.int64" if kind.startswith("i64") else name for name, kind in parameters]
    constants = [f"{name}: tl.constexpr" for name in schedule if name.isupper()]
    text = Template(PRODUCT).substitute(
        kernel=kernel,
        parameters=wrapped(", ".join([*listed, *constants])),
        columns=given.columns,
        band=BAND,
        wide=wide(region),
        coordinates=lines(coordinates(fused.after, used)),
        steps=given.groups * parts,
        along=lines(_along(given.groups, parts, length, is_whole=is_whole), 2),
        edges="" if is_whole else f"        in_inner, in_depth = ({within} < {length})[None, :], ({within} < {length})[:, None]",
        left=lines(left, 2),
        weight=_weight(fused),
        in_depth="" if is_whole else " & in_depth",
        sum=lines(_sum(fused, parts), 2),
        body=lines(after),
        stores=lines(stores),
    )
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


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


def _weight(fused: Fused) -> str:
    """The pointers of a block [BLOCK_INNER, BLOCK_COLUMNS]."""
    given, name = fused.given, fused.names[fused.given.weight]
    at = ("depth", "column") if given.is_turned else ("column", "depth")
    strides = layout_of(given.weight, name).strides
    return f"{name}_ptr + {plus(*(times(text, stride) for text, stride in zip(at, strides, strict=True)))}"


def _scale(fused: Fused, group: str) -> str:
    scale = fused.given.scale
    assert scale is not None  # asked by the callers
    name = fused.names[scale]
    offset = plus(*(times(text, stride) for text, stride in zip(("column", group), layout_of(scale, name).strides, strict=True)))
    return f"tl.load({name}_ptr + {offset}, mask=in_columns, other=0.0).to(tl.float32)"


def _sum(fused: Fused, parts: int) -> list[str]:
    """How a block's products are added: as they are, or times the scale of their group."""
    right = "right" if fused.given.scale is None else "right.to(left.dtype)"
    if fused.given.groups == 1:
        return [f'total = tl.dot(left, {right}, total, input_precision="ieee")']
    group = "step" if parts == 1 else f"(step // {parts})"
    return [f'part = tl.dot(left, {right}, input_precision="ieee")', f"total += part * {_scale(fused, group)}"]


def _place(fused: Fused) -> str:
    return f"{times('row', fused.given.columns)} + column"


def _launches(fused: Fused, kernel: str, schedule: Schedule) -> tuple[str, ...]:
    region, names, columns = fused.region, fused.names, fused.given.columns
    symbols = symbols_of(region)
    reads, first = [names[node] for node in region.reads], names[region.writes[0]]
    strides = [f"{names[node]}.stride({axis})" for node, layout in fused.after.layouts.items() for _, axis in layout.parameters]
    given = [*reads, *(names[node] for node in region.writes), *strides, *(symbol for symbol, _ in symbols), "rows"]
    found = [*prepared(region, fused.after, symbols), f"rows = {first}.numel() // {columns}"]
    chosen = "SCHEDULE"
    if fused.rows is None:
        few = ", ".join(f'"{key}": {value}' for key, value in fused.schedules_for(FEW_ROWS)[0].items())
        found += [f"few = {{{few}}}", f"schedule = SCHEDULE if rows > {FEW_ROWS} else few"]
        chosen = "schedule"
    return (
        *found,
        f"if {first}.numel() > 0:",
        f'    programs = triton.cdiv(rows, {chosen}["BLOCK_ROWS"]) * triton.cdiv({columns}, {chosen}["BLOCK_COLUMNS"])',
        f"    {kernel}[(programs,)](",
        *wrapped(", ".join([*given, f"**{chosen}"]), 2).splitlines(),
        "    )",
    )


def _reference(fused: Fused, symbols: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Every node as a call of torch, the product in f32 with a weight that is multiplied out."""
    region, names, given = fused.region, fused.names, fused.given
    found = symbol_lines(symbols, [names[node] for node in region.reads])
    for node in region.nodes:
        found += _product_lines(fused) if node is fused.node else [torch_line(node, names)]
    half = [node for node in region.writes if dtype_of(node) == "bf16"]
    found += [f"{names[node]} = {names[node]}.to(torch.bfloat16)" for node in half if dtype_of(given.x) == "bf16"]
    return tuple(found)


def _product_lines(fused: Fused) -> list[str]:
    given, names = fused.given, fused.names
    weight = f"{names[given.weight]}{'.t()' if given.is_turned else ''}.float()"
    found = []
    if given.scale is not None:
        shape = (given.columns, given.groups, given.inner // given.groups)
        found.append(f"wide = ({weight}.reshape{shape} * {names[given.scale]}.float()[:, :, None]).reshape({shape[0]}, {given.inner})")
        weight = "wide"
    bias = f", {names[given.bias]}.float()" if given.bias is not None else ""
    x = names[given.x]
    return [*found, f"{names[fused.node]} = torch.nn.functional.linear({x}.float(), {weight}{bias}).to({x}.dtype)"]


PRODUCTS = WholeOp("product", refuses, goes_first, effort, lambda region: Fused(region).schedules, build, joins)
