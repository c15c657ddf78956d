"""The file around a kernel: what it computes, the launcher, the same in torch, and a main part that checks and times it.

The file imports nothing of ours. Run alone it compares the kernel with torch: on a GPU, where it is then timed, or in triton's interpreter.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import torch
from torch.fx import Node

from paretorch.codegen.coordinates import size_text
from paretorch.codegen.emission import Emitter
from paretorch.codegen.expressions import dtype_of
from paretorch.codegen.kernel import Region, Schedule
from paretorch.codegen.layouts import merged_pairs
from paretorch.ir.graph import shape_of, type_of
from paretorch.ir.ops import op_of
from paretorch.ir.types import DTYPES, size_of

Symbols = Sequence[tuple[str, str]]  # (symbol, the launcher's text for it)
LONGEST_LINE = 130
EXAMPLE_SIZE = 64  # what a symbolic size is when a file runs alone

FILE = Template('''\
"""${title}

${region}

template ${template}; schedule ${schedule}; ${predicted}.
Run this file to compare the kernel with torch and, on a GPU, to time it.
"""

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import triton
import triton.language as tl

SCHEDULE = {${options}}


${kernel}

${laid}${known}def launch(${reads}):
    """${launch_title}"""
${launches}
    return ${writes}


def reference(${reads}):
    """The same in torch."""
${reference}
    return ${writes}


EXAMPLES = (  # shape, stride, dtype
${examples}
)


def example(shape, stride, dtype):
    """A tensor of random numbers that lies so in memory."""
${example_type}    count = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values = values > 0 if dtype == torch.bool else values.to(dtype)
    return values.to("cuda" if torch.cuda.is_available() else "cpu").as_strided(shape, stride)


if __name__ == "__main__":
    inputs = [example(*row) for row in EXAMPLES]
    outputs, expected = launch(*inputs), reference(*inputs)
    if torch.is_tensor(outputs):
        outputs, expected = (outputs,), (expected,)
    for output, same in zip(outputs, expected):
        rounding = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(output.dtype, 1e-4)
        torch.testing.assert_close(output, same, rtol=rounding, atol=rounding, equal_nan=True)
    print("${name}: agrees with torch")
    if torch.cuda.is_available():
        milliseconds = triton.testing.do_bench(lambda: launch(*inputs))
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        print(f"${name}: {milliseconds * 1e3:.1f} us, {moved / milliseconds / 1e6:.0f} GB/s; ${predicted}")
''')

EXAMPLE_TYPE = """\
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        dtype = torch.float32  # triton's interpreter has no products of bf16
"""

EXAMPLE_COUNT = """\
    if dtype in (torch.int32, torch.int64):  # numbers of keys, or pages
        most = ${most}
        return torch.randint(0, most, shape, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
"""

LAID = '''\
def laid(x, unit, pairs):
    """x itself where that axis has stride one and each pair of axes is passed over as one, else a contiguous copy."""
    fits = (unit is None or x.stride(unit) == 1) and all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in pairs)
    return x if fits else x.contiguous()


'''


KNOWN = '''\
def known(schedule, x):
    """The options that the compiler of this device knows: a limit of registers is NVIDIA's."""
    return schedule if x.is_cuda and torch.version.cuda else {name: value for name, value in schedule.items() if name != "maxnreg"}


'''


@dataclass(frozen=True)
class Launch:
    """What a file needs beside its region and kernel. symbols: names of symbolic sizes with their text; predicted: seconds, and on what device."""

    name: str
    emitter: Emitter
    symbols: Symbols
    schedule: Schedule
    constants: Schedule
    predicted: tuple[float, str] | None


def region_text(region: Region) -> str:
    """The region as lines: what it reads, its nodes with their types, what it writes."""
    lines = [f"{node.name} : {type_of(node)}" for node in region.reads]
    lines += [f"{node.name} = {_call(node)} : {type_of(node)}" for node in region.nodes]
    return "\n".join([*lines, f"-> {', '.join(node.name for node in region.writes)}"])


def _call(node: Node) -> str:
    op = op_of(node)
    shown = [_shown(value) for value in node.args]
    shown += [f"{key}={_shown(value)}" for key, value in sorted(node.kwargs.items())]
    return f"{op.name if op is not None else node.target}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shown(part) for part in value)}]"
    return value.name if isinstance(value, Node) else str(value)


def file_text(region: Region, launch: Launch, kernel: str) -> str:
    """The whole file."""
    names = launch.emitter.names
    reads, writes = [names[node] for node in region.reads], [names[node] for node in region.writes]
    strides = [f"{names[node]}.stride({axis})" for node, layout in launch.emitter.layouts.items() for _, axis in layout.parameters]
    constants = [f"{key}={value}" for key, value in launch.constants.items()]
    width = f" // {region.shape[-1]}" if region.is_rows else ""
    first = next((names[node] for node in region.writes if shape_of(node) == region.shape), writes[0])
    rows = f"{first}.numel(){width if first in [names[n] for n in region.writes if shape_of(n) == region.shape] else ''}"
    grid = f"({rows},)" if region.is_rows else f'(triton.cdiv({first}.numel(), SCHEDULE["BLOCK"]),)'
    call = wrapped(", ".join([*reads, *writes, *strides, *(symbol for symbol, _ in launch.symbols), *constants, "**SCHEDULE"]), 2)
    launches = [
        *prepared(region, launch.emitter, launch.symbols),
        f"if {writes[0]}.numel() > 0:",
        f"    {launch.name}[{grid}](",
        *call.splitlines(),
        "    )",
    ]
    reference = [*symbol_lines(launch.symbols, reads), *(torch_line(node, names) for node in region.nodes)]
    parts = FileParts(launch.name, kernel, names, launches, reference, launch.schedule, launch.predicted)
    return file_of(region, parts)


@dataclass(frozen=True)
class FileParts:
    """What differs from file to file. kernel: the text of the device functions; launches, reference: lines of the two ways to compute the region;
    names: of what is read and written, in those lines."""

    name: str
    kernel: str
    names: dict[Node, str]
    launches: Sequence[str]
    reference: Sequence[str]
    schedule: Schedule
    predicted: tuple[float, str] | None


def file_of(region: Region, parts: FileParts) -> str:
    """The whole file of these parts."""
    reads, writes = [parts.names[node] for node in region.reads], [parts.names[node] for node in region.writes]
    options = ", ".join(f'"{key}": {value}' for key, value in parts.schedule.items())
    return FILE.substitute(
        title=f"{parts.name}: {len(region.nodes)} {'nodes' if len(region.nodes) > 1 else 'node'} of a graph as one kernel.",
        region="\n".join(f"    {line}" for line in region_text(region).splitlines()),
        template=region.template,
        schedule=", ".join(f"{key}={value}" for key, value in parts.schedule.items()),
        predicted=_predicted(parts.predicted),
        options=options,
        kernel=parts.kernel,
        laid=LAID if any("laid(" in line for line in parts.launches) else "",
        known=KNOWN if any("known(" in line for line in parts.launches) else "",
        reads=", ".join(reads),
        launch_title=f"{', '.join(reads)} -> {', '.join(writes)}; tensors on one device.",
        launches=_lines(parts.launches),
        name=parts.name,
        writes=f"({', '.join(writes)})" if len(writes) > 1 else writes[0],
        reference=_lines(parts.reference),
        example_type=(EXAMPLE_TYPE if "tl.dot(" in parts.kernel else "") + _example_count(parts.kernel),
        examples="\n".join(
            f"    ({_numbers(shape_of(node))}, {_numbers(_strides(node))}, {DTYPES[dtype_of(node)]})," for node in region.reads
        ),
    )


def _example_count(kernel: str) -> str:
    """Whole numbers that a kernel of attention can take."""
    if "pages_ptr" in kernel:
        return EXAMPLE_COUNT.replace("${most}", "EXAMPLES[1][0][0]")
    if "lengths_ptr" in kernel:
        return EXAMPLE_COUNT.replace("${most}", "1 + max(row[0][2] for row in EXAMPLES if len(row[0]) == 4)")
    return ""


def wrapped(listed: str, by: int = 1) -> str:
    """A list of arguments, over several lines if it is long."""
    indent, tied = "    " * by, listed.replace(": ", ":\N{NO-BREAK SPACE}")  # a name stays beside its type
    found = textwrap.fill(
        tied, LONGEST_LINE, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return found.replace("\N{NO-BREAK SPACE}", " ")


def _predicted(predicted: tuple[float, str] | None) -> str:
    return "not priced" if predicted is None else f"predicted {predicted[0] * 1e6:.1f} us on {predicted[1]}"


def prepared(region: Region, emitter: Emitter, symbols: Symbols) -> list[str]:
    """Lines that bring operands into the layouts that the kernel takes, and make room for results."""
    names, lines = emitter.names, []
    reads = [names[node] for node in region.reads]
    for node in region.reads:
        layout = emitter.layouts[node]
        pairs = merged_pairs(layout, node, emitter.merged, region.shape)
        if layout.is_contiguous:
            lines.append(f"{names[node]} = {names[node]}.contiguous()")
        elif layout.unit_axis is not None or pairs:
            lines.append(f"{names[node]} = laid({names[node]}, {layout.unit_axis}, {pairs})")
    lines += symbol_lines(symbols, reads)
    for node in region.writes:
        sizes = ", ".join(size_text(size) for size in shape_of(node))
        dtype = DTYPES[dtype_of(node)]
        lines.append(
            f"{names[node]} = torch.empty(({sizes}{',' if len(shape_of(node)) == 1 else ''}), dtype={dtype}, device={reads[0]}.device)"
        )
    return lines


def symbol_lines(symbols: Symbols, reads: Sequence[str]) -> list[str]:
    """Lines that set symbolic sizes. reads: names of what is read."""
    return [f"{symbol} = {text.format(*reads)}" for symbol, text in symbols]


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


# the same in torch


def torch_line(node: Node, names: dict[Node, str]) -> str:
    """This node as a call of torch."""
    return f"{names[node]} = {_torch_call(node, names)}"


def _torch_call(node: Node, names: dict[Node, str]) -> str:
    if getattr(node.target, "__name__", "") == "getitem":
        return f"{names[node.args[0]]}[{node.args[1]}]"  # type: ignore[index]
    target = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
    given = [_argument(value, names) for value in node.args]
    given += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if key not in ("device", "layout", "pin_memory")]
    return f"torch.ops.{target}({', '.join(given)})"


def _argument(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value] if value in names else size_text(size_of(value.meta["val"]))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(part, names) for part in value)}]"
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(value)


def _strides(node: Node) -> tuple[Any, ...]:
    return tuple(size_of(stride) for stride in node.meta["val"].stride())


def _numbers(sizes: Sequence[Any]) -> str:
    known = [size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, EXAMPLE_SIZE))) for size in sizes]
    return f"({', '.join(map(str, known))}{',' if len(known) == 1 else ''})"
