"""Rendering: a region's template filled in, as a file that can be read, imported, and run alone to benchmark itself.

The text depends on the region only, so the same region gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

import sympy
from torch.fx import Node

from paretorch.codegen.broadcast import Places, places
from paretorch.codegen.expressions import TRITON_TYPES, compute_type, dtype_of, load, number, statement, unique_names
from paretorch.codegen.kernel import Kernel, Region
from paretorch.codegen.templates import TEMPLATES
from paretorch.codegen.templates.row_norm import norm_of
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import arguments, shape_of, type_of
from paretorch.ir.ops import op_of
from paretorch.ir.types import DTYPES

EXAMPLE_SIZE = 64  # what a symbolic size is when a file benchmarks itself

FILE = Template('''\
"""${title}

${region}

template ${template}; schedule ${schedule}. Run this file to benchmark the kernel on a GPU.
"""

import sys

import torch
import triton
import triton.language as tl


${kernel}

def launch(${reads}):
    """${launch_title}"""
    shape = torch.broadcast_shapes(${shapes})
    ${reads_line}
${allocate}
    if ${first}.numel() > 0:
        ${name}[${grid}](${call})
    return ${writes}


EXAMPLES = (
${examples}
)

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here; with TRITON_INTERPRET=1 launch() also takes tensors on the CPU")
    inputs = [torch.ones(shape, dtype=dtype, device="cuda") for shape, dtype in EXAMPLES]
    outputs = launch(*inputs)
    tensors = [*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))]
    milliseconds = triton.testing.do_bench(lambda: launch(*inputs))
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    print(f"${name}: {milliseconds * 1e3:.1f} us, {moved / milliseconds / 1e6:.0f} GB/s")
''')


def render(region: Region, number_of_kernel: int = 0, schedule: dict[str, int] | None = None) -> Kernel:
    """The kernel of a region. number_of_kernel: starts its name; schedule: None for the template's default.

    Raises LoweringError if the template cannot take it.
    """
    template = TEMPLATES[region.template]
    reason = template.legal(region)
    if reason is not None:
        raise LoweringError(f"template {template.name} cannot take {region}: {reason}")
    name = _name(region, number_of_kernel)
    names = unique_names([*region.reads, *region.nodes])
    is_row = region.template != "elementwise"
    result = shape_of(region.nodes[0])
    schedule = schedule or template.schedules(result[-1] if is_row else None)[0]
    slots, sizes = _row_slots(region, names) if is_row else _flat_slots(region, names)
    pointers = [(f"{names[node]}_ptr", f"*{TRITON_TYPES[dtype_of(node)]}") for node in (*region.reads, *region.writes)]
    parameters = [*pointers, *((size, kind) for size, kind, _ in sizes)]
    kernel = template.fill(kernel=name, parameters=", ".join(parameter for parameter, _ in parameters), **slots)
    source = _file(region, name, names, kernel, schedule, sizes)
    return Kernel(name, source, region_text(region), region.template, schedule, tuple(parameters))


def region_text(region: Region) -> str:
    """The region as lines: what it reads, its nodes with their types, what it writes."""
    lines = [f"{node.name} : {type_of(node)}" for node in region.reads]
    lines += [f"{node.name} = {_call(node)} : {type_of(node)}" for node in region.nodes]
    return "\n".join([*lines, f"-> {', '.join(node.name for node in region.writes)}"])


def _call(node: Node) -> str:
    op = op_of(node)
    shown = [f"{value.name}" if isinstance(value, Node) else str(value) for value in node.args]
    shown += [f"{key}={value.name if isinstance(value, Node) else value}" for key, value in sorted(node.kwargs.items())]
    return f"{op.name if op is not None else node.target}({', '.join(shown)})"


def _name(region: Region, number_of_kernel: int) -> str:
    """kernel_03_add_rms_norm; at most four ops are named."""
    ops = [op.name for node in region.nodes if (op := op_of(node)) is not None]
    shown = list(dict.fromkeys(ops))
    return f"kernel_{number_of_kernel:02d}_{'_'.join(shown[:4])}" + ("_etc" if len(shown) > 4 else "")


Sizes = list[tuple[str, str, str]]  # name, Triton type, text that the launcher passes


def _flat_slots(region: Region, names: dict[Node, str]) -> tuple[dict[str, str], Sizes]:
    result = shape_of(region.nodes[0])
    where = places(result, [shape_of(node) for node in region.reads])
    loads = [load(node, names[node], offset, "inside" if offset else "") for node, offset in zip(region.reads, where.offsets, strict=True)]
    slots = {
        "coordinates": _lines(where.lines),
        "loads": _lines(loads),
        "body": _lines(statement(node, names) for node in region.nodes),
        "stores": _lines(f"tl.store({names[node]}_ptr + place, {names[node]}, mask=inside)" for node in region.writes),
    }
    return slots, [("count", "i64", f"{names[region.writes[0]]}.numel()"), *_sizes(where)]


def _row_slots(region: Region, names: dict[Node, str]) -> tuple[dict[str, str], Sizes]:
    norm = norm_of(region)
    given = arguments(norm)
    result, at = shape_of(norm), region.nodes.index(norm)
    where = places(result[:-1], [shape_of(node)[:-1] for node in region.reads], "row")
    loads = [load(node, names[node], *_row_offset(node, offset, result)) for node, offset in zip(region.reads, where.offsets, strict=True)]
    held = compute_type(dtype_of(norm))
    scale, shift = (_affine(given.get(key), held, names, sign) for key, sign in (("weight", "*"), ("bias", "+")))
    source = given["input"]
    x = names[source] if compute_type(dtype_of(source)) == held else f"{names[source]}.to(tl.{'float64' if held == 'f64' else 'float32'})"
    slots = {
        "coordinates": _lines(where.lines),
        "loads": _lines(loads),
        "before": _lines(statement(node, names) for node in region.nodes[:at]),
        "x": x,
        "y": names[norm],
        "affine": scale + shift,
        "after": _lines(statement(node, names) for node in region.nodes[at + 1 :]),
        "stores": _lines(f"tl.store({names[node]}_ptr + row * width + column, {names[node]}, mask=inside)" for node in region.writes),
    }
    return slots, [("width", "i32", "shape[-1]"), ("eps", "fp32", number(float(given["eps"]))), *_sizes(where)]


def _row_offset(node: Node, offset: str, result: Sequence[object]) -> tuple[str, str]:
    """The offset of an operand's elements in this row, and their mask; per-row values have one element."""
    shape = shape_of(node)
    if not shape or shape[-1] != result[-1] or shape[-1] == 1:
        return offset, ""
    lead = f"({offset}) * width + " if " " in offset else f"{offset} * width + " if offset else ""
    return f"{lead}column", "inside"


def _affine(value: Node | None, held: str, names: dict[Node, str], sign: str) -> str:
    if value is None:
        return ""
    cast = "" if compute_type(dtype_of(value)) == held else f".to(tl.{'float64' if held == 'f64' else 'float32'})"
    return f" {sign} {names[value]}{cast}"


def _sizes(where: Places) -> Sizes:
    return [(name, "i32", " * ".join(f"shape[{axis}]" for axis in axes)) for name, axes in where.sizes]


def _lines(lines: object) -> str:
    return "\n".join(f"    {line}" for line in lines)  # type: ignore[attr-defined]


def _file(region: Region, name: str, names: dict[Node, str], kernel: str, schedule: dict[str, int], sizes: Sizes) -> str:
    reads, writes = [names[node] for node in region.reads], [names[node] for node in region.writes]
    first = writes[0]
    allocate = [f"{names[node]} = torch.empty(shape, dtype={DTYPES[dtype_of(node)]}, device={reads[0]}.device)" for node in region.writes]
    grid = (
        f"(triton.cdiv({first}.numel(), {schedule['BLOCK']}),)" if region.template == "elementwise" else f"({first}.numel() // shape[-1],)"
    )
    call = [*reads, *writes, *(text for _, _, text in sizes), *(f"{key}={value}" for key, value in schedule.items())]
    examples = [f"    ({_example(shape_of(node))}, {DTYPES[dtype_of(node)]})," for node in region.reads]
    several = len(writes) > 1
    return FILE.substitute(
        title=f"{name}: {len(region.nodes)} {'nodes' if len(region.nodes) > 1 else 'node'} of a graph as one kernel.",
        region="\n".join(f"    {line}" for line in region_text(region).splitlines()),
        template=region.template,
        schedule=", ".join(f"{key}={value}" for key, value in schedule.items()),
        kernel=kernel,
        reads=", ".join(reads),
        launch_title=f"{', '.join(reads)} -> {', '.join(writes)}; tensors on one device.",
        shapes=", ".join(f"{read}.shape" for read in reads),
        reads_line=f"{', '.join(reads)} = {', '.join(f'{read}.contiguous()' for read in reads)}",
        allocate=_lines(allocate),
        first=first,
        name=name,
        grid=grid,
        call=", ".join(call),
        writes=f"({', '.join(writes)})" if several else first,
        examples="\n".join(examples),
    )


def _example(shape: Sequence[int | sympy.Expr]) -> str:
    sizes = [size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, EXAMPLE_SIZE))) for size in shape]
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
