"""Rendering: a region's template filled in.

The text depends on the region only, so the same region gives the same bytes. Sizes that are known are numbers in the text, symbols are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from string import Template

from paretorch.codegen.coordinates import plus, product, size_text, times
from paretorch.codegen.emission import COLUMN, IDENTITY, Emitter, Line
from paretorch.codegen.expressions import LANGUAGE_TYPES, TRITON_TYPES, compute_type, dtype_of
from paretorch.codegen.kernel import Kernel, Region, Schedule
from paretorch.codegen.kernel_file import LONGEST_LINE, FileParts, Launch, file_of, file_text, region_text, wrapped
from paretorch.codegen.regions import default_schedule, emitted
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.templates import TEMPLATES
from paretorch.codegen.templates.long_row import PASS
from paretorch.codegen.triton_offsets import coordinates, wide
from paretorch.codegen.whole_ops import WHOLE_OPS, not_taken
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import shape_of
from paretorch.ir.ops import op_of


def render(
    region: Region, number_of_kernel: int = 0, schedule: Schedule | None = None, predicted: tuple[float, str] | None = None
) -> Kernel:
    """The kernel of a region. number_of_kernel: starts its name; schedule: None for the template's default; predicted: seconds, and on what device.

    Raises LoweringError if no template can take it.
    """
    if region.template in WHOLE_OPS:
        return _render_op(region, _name(region, number_of_kernel), schedule, predicted)
    template = TEMPLATES[region.template]
    try:
        emitter = emitted(region)
    except LoweringError as error:
        raise LoweringError(f"template {template.name} cannot take {region}: {error}") from error
    name, width = _name(region, number_of_kernel), region.shape[-1] if region.is_rows else None
    schedule = schedule or default_schedule(region, emitter)
    symbols = symbols_of(region)
    pointers = [(f"{emitter.names[node]}_ptr", f"*{TRITON_TYPES[dtype_of(node)]}") for node in (*region.reads, *region.writes)]
    strides = [(parameter, "i64") for layout in emitter.layouts.values() for parameter, _ in layout.parameters]
    parameters = (*pointers, *strides, *((symbol, "i64") for symbol, _ in symbols))
    shown = ", ".join(parameter if kind != "i64" else f"{parameter}: tl.int64" for parameter, kind in parameters)
    slots = _long_slots(region, emitter) if region.template == "long_row" else _slots(region, emitter)
    text = template.fill(kernel=name, parameters=shown, wide=wide(region), count=size_text(product(region.shape)), **slots)
    head, _, rest = text.partition("):\n")
    if len(head) > LONGEST_LINE:
        opened, _, listed = head.partition("(")
        text = f"{opened}(\n{wrapped(listed)}\n):\n{rest}"
    constants = {"WIDTH": width} if width is not None else {}
    launch = Launch(name, emitter, symbols, schedule, constants, predicted)
    source = file_text(region, launch, text)
    seconds = predicted[0] if predicted is not None else None
    return Kernel(name, source, region_text(region), region.template, schedule, parameters, constants, seconds)


def _render_op(region: Region, name: str, schedule: Schedule | None, predicted: tuple[float, str] | None) -> Kernel:
    """The kernel of an op that has a template of its own. Raises LoweringError."""
    reason = not_taken(region)
    if reason is not None:
        raise LoweringError(f"template {region.template} cannot take {region}: {reason}")
    built = WHOLE_OPS[region.template].build(region, name, schedule)
    parts = FileParts(name, built.text, built.names, built.launches, built.reference, built.schedule, predicted)
    seconds = predicted[0] if predicted is not None else None
    return Kernel(
        name, file_of(region, parts), region_text(region), region.template, built.schedule, built.parameters,
        predicted_s=seconds, parts=built.parts,
    )  # fmt: skip


def _name(region: Region, number_of_kernel: int) -> str:
    """kernel_03_add_rms_norm; at most four ops are named."""
    ops = [op.name for node in region.nodes if (op := op_of(node)) is not None and op.kind not in ("view", "scalar")]
    shown = list(dict.fromkeys(ops)) or ["copy"]
    return f"kernel_{number_of_kernel:02d}_{'_'.join(shown[:4])}" + ("_etc" if len(shown) > 4 else "")


def _slots(region: Region, emitter: Emitter) -> dict[str, str]:
    loads = [line for line in emitter.lines if line.is_load]
    body = [line for line in emitter.lines if not line.is_load]
    stores = _stores(region, emitter)
    used = " ".join([*(line.text for line in emitter.lines), *emitter.conditions, *(text for _, text in stores)])
    return {
        "coordinates": indented([*coordinates(emitter, used), *emitter.conditions]),
        "loads": indented(map(str, loads)),
        "body": indented(map(str, body)),
        "stores": indented(text for _, text in stores),
    }


def _stores(region: Region, emitter: Emitter) -> list[tuple[bool, str]]:
    """(whether it is of elements, not of one number a row; the text) of each store."""
    found = []
    for node in region.writes:
        variable = emitter.write(node)
        of_elements = not region.is_rows or shape_of(node) == region.shape
        offset = _place(region) if of_elements else "row"
        text = f"tl.store({emitter.names[node]}_ptr + {offset}, {variable}{', mask=inside' if of_elements else ''})"
        found.append((of_elements, text))
    return found


def _place(region: Region) -> str:
    return plus(times("row", region.shape[-1]), COLUMN) if region.is_rows else "place"


def indented(lines: Iterable[str], by: int = 1) -> str:
    return "\n".join(f"{'    ' * by}{line}" for line in lines)


# rows in several passes


def _long_slots(region: Region, emitter: Emitter) -> dict[str, str]:
    """Lines outside of all loops stand where they are first needed; inside of a loop those that its result needs."""
    varying = _varying(emitter.lines)
    stores, text = _stores(region, emitter), ""
    out: list[str] = []
    held = next(compute_type(dtype_of(node)) for node in region.nodes if dtype_of(node))
    for place, line in enumerate(emitter.lines):
        if line.reduction:
            text += "\n".join([*out, _pass(line, emitter.lines[:place], varying, LANGUAGE_TYPES[held])])
            out = []
        elif line.name not in varying:
            out.append(f"    {line}")
    inner = [text for of_elements, text in stores if of_elements]
    needed = _needed(" ".join(inner), emitter.lines, varying)
    numbers = [*out, *(f"    {text}" for of_elements, text in stores if not of_elements)]
    used = " ".join([*(line.text for line in emitter.lines), *inner])
    return {
        "coordinates": indented(coordinates(emitter, used)),
        "passes": text,
        "numbers": "\n".join(numbers),
        "lines": indented(needed, 2),
        "stores": indented(inner, 2),
    }


def _varying(lines: Sequence[Line]) -> set[str]:
    """Names of the values that differ along the row."""
    found: set[str] = set()
    for line in lines:
        if not line.reduction and (COLUMN in line.words or "inside" in line.words or line.words & found):
            found.add(line.name)
    return found


def _needed(text: str, lines: Sequence[Line], varying: set[str]) -> list[str]:
    """The varying lines that a text needs, in order."""
    words, kept = set(re.findall(r"[A-Za-z_]\w*", text)), []
    for line in reversed(lines):
        if line.name in words and line.name in varying:
            kept.append(str(line))
            words |= line.words
    return kept[::-1]


def _pass(line: Line, before: Sequence[Line], varying: set[str], type_: str) -> str:
    steps, value = f"{line.name}_steps", f"tl.where(inside, {line.text}, {IDENTITY[line.reduction]})"
    combined = f"{steps} + {value}" if line.function == "sum" else f"tl.{line.function}imum({steps}, {value})"
    return Template(PASS).substitute(
        steps=steps, identity=IDENTITY[line.reduction], type=type_, lines=indented(_needed(line.text, before, varying), 2), combined=combined,
        name=line.name, function=line.function, divided=" / WIDTH" if line.reduction == "mean" else "",
    )  # fmt: skip
