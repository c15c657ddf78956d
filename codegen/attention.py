"""Attention and local attention as one kernel: what the template takes, how much it does, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch.fx import Node

from paretorch.codegen.attention_text import Facts, combine_text, device_text
from paretorch.codegen.expressions import TRITON_TYPES, dtype_of
from paretorch.codegen.kernel import Part, Region, Schedule
from paretorch.codegen.kernel_file import wrapped
from paretorch.codegen.schedules import attention_schedules
from paretorch.codegen.templates.split_attention import MOST_SPLITS, PROGRAMS
from paretorch.codegen.whole_op import Built, Effort, WholeOp, stride_kind, stride_kinds
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import op_of
from paretorch.ir.ops.attention import COUNTS
from paretorch.ir.types import DTYPES

HELD = ("f32", "f16", "bf16")
WIDEST = {"f32": 128, "f16": 256, "bf16": 256}  # of a head: beyond it no block of keys and values is held without spills


def facts_of(node: Node) -> Facts:
    """The op's arguments by name, those of the node's form of attention that it has."""
    given = {name: value for name, value in arguments(node).items() if value is not None and name in Facts.__dataclass_fields__}
    return Facts(**given)


def refuses(node: Node) -> str | None:
    """None, or why the template does not take it."""
    given = arguments(node)
    values = [given[name] for name in ("query", "key", "value")]
    shapes = [shape_of(value) for value in values]
    dtypes = list(dict.fromkeys(map(dtype_of, values)))
    if len(dtypes) > 1 or dtypes[0] not in HELD:
        return f"{node.name} is of {', '.join(dtypes)}; the template takes one of {', '.join(HELD)}"
    if any(len(shape) != 4 for shape in shapes):
        return f"{node.name} has operands of {', '.join(str(len(shape)) for shape in shapes)} axes; the template takes [B, H, T, D]"
    query, key, value = shapes
    pages = given.get("pages")
    if (pages is None and query[0] != key[0]) or key[:3] != value[:3] or query[3] != key[3]:
        return f"{node.name} has query {list(query)}, key {list(key)} and value {list(value)}; the template takes one batch and one length of keys"
    fixed = (query[1], key[1], query[3], value[3])
    if not all(isinstance(size, int) for size in fixed) or query[1] % key[1]:
        return (
            f"{node.name} has {query[1]} heads on {key[1]} of width {query[3]} and {value[3]}; the template takes known numbers, a multiple"
        )
    widest = WIDEST[dtypes[0]]
    if max(query[3], value[3]) > widest:
        return f"{node.name} has heads of width {max(query[3], value[3])}; in {dtypes[0]} the template holds {widest}"
    if pages is not None and (reason := _paged(node, pages, query[0], key[2])):
        return reason
    return _hidden(node, given, (query[0], query[1], query[2], facts_of(node).keys))


def _paged(node: Node, pages: Node, batch: Any, slots: Any) -> str | None:
    """Why a table of pages cannot be taken, if so."""
    shape, dtype = shape_of(pages), dtype_of(pages)
    if dtype not in COUNTS or len(shape) != 2 or shape[0] not in (1, batch):
        return f"{node.name} has a table of pages {dtype}{list(shape)}; the template takes {' or '.join(COUNTS)} {[batch, 'n']}"
    if not isinstance(slots, int):
        return f"{node.name} has pages of {slots} slots; the template takes a known number"
    return None


def _hidden(node: Node, given: dict[str, Any], scores: tuple[Any, ...]) -> str | None:
    """Why a mask, a bias or a number cannot be taken, if so."""
    for name in ("scale", "left", "right", "sinks", "offset", "softcap"):
        if isinstance(given.get(name), Node):
            return f"{node.name} computes its {name}; the template takes a number"
    mask, bias = given.get("mask"), given.get("key_bias")
    if mask is not None and (dtype_of(mask) not in ("bool", "f64", *HELD) or len(shape_of(mask)) > 4):
        return f"{node.name} has a mask of {dtype_of(mask)}{list(shape_of(mask))}; the template takes truths or real numbers, and four axes"
    if mask is not None:
        own = shape_of(mask)
        if any(size not in (1, wanted) for size, wanted in zip(own, scores[4 - len(own) :], strict=True)):
            return f"{node.name} has a mask of {list(own)}, which is not broadcast to {list(scores)}"
    if bias is not None and (len(shape_of(bias)) != 2 or shape_of(bias)[1] != scores[3] or shape_of(bias)[0] not in (1, scores[0])):
        return f"{node.name} has a key bias of {list(shape_of(bias))}; the template takes {[scores[0], scores[3]]}"
    return _counted(node, given.get("lengths"), (scores[0], scores[2]))


def _counted(node: Node, lengths: Node | None, rows: tuple[Any, Any]) -> str | None:
    """Why numbers of keys cannot be taken, if so. rows: batch and queries."""
    if lengths is None:
        return None
    shape, dtype = shape_of(lengths), dtype_of(lengths)
    if dtype not in COUNTS or len(shape) != 2 or any(size not in (1, most) for size, most in zip(shape, rows, strict=True)):
        return f"{node.name} has lengths {dtype}{list(shape)}; the template takes {' or '.join(COUNTS)} {list(rows)}, or one for all"
    return None


def goes_first(node: Node) -> bool:
    """Where torch would make a mask for it, and run a kernel that reads one; plain and causal attention it has kernels for."""
    facts = facts_of(node)
    banded = facts.left >= 0 or (facts.right >= 0 and (facts.right, facts.offset) != (0, 0))
    return banded or facts.softcap != 0.0 or any(given is not None for given in (facts.mask, facts.key_bias, facts.lengths, facts.pages))


def effort(region: Region) -> Effort:
    """As the op's own, but for keys that its position hides from a query: the blocks of those are not visited."""
    node = region.nodes[0]
    facts, op = facts_of(node), op_of(node)
    assert op is not None  # a node of a row of the table
    query = shape_of(facts.query)
    width = query[3] + shape_of(facts.value)[3]
    flops = 2 * query[0] * query[1] * query[2] * width * seen_keys(facts, query[2], facts.keys)
    return Effort(flops, op.bytes(node), 2 if facts.is_split else 1, is_rated_alike=facts.pages is None)


def seen_keys(facts: Facts, queries: Any, keys: Any) -> Any:
    """The mean number of keys that a query's position lets it see, ends of the sequence aside."""
    right = keys if facts.right < 0 else sympy.Max(1, facts.offset + facts.right + (queries + 1) / 2)
    if facts.left < 0:
        return sympy.Min(keys, right)
    return sympy.Min(keys, facts.left + facts.sinks + 1 + (facts.right if facts.right >= 0 else keys))


def schedules(region: Region) -> tuple[Schedule, ...]:
    """The largest blocks that every architecture holds, then smaller ones, then some that only part of them hold."""
    node = region.nodes[0]
    facts = facts_of(node)
    query, value = shape_of(facts.query), shape_of(facts.value)
    rows = query[2] * facts.group if isinstance(query[2], int) else None
    keys = facts.keys if isinstance(facts.keys, int) else None
    itemsize = DTYPES[dtype_of(facts.query)].itemsize
    aligned = all(kind.endswith(":16") for operand in (facts.key, facts.value) for _, kind in stride_kinds(operand, "x", (2,)))
    form = facts.form if aligned else "heavy"
    return attention_schedules(itemsize, query[3], value[3], rows, keys, form=form)


def build(region: Region, kernel: str, schedule: Schedule | None = None) -> Built:
    """The file's parts for a region of one attention."""
    node = region.nodes[0]
    facts = facts_of(node)
    roles = facts.roles
    schedule = schedule or schedules(region)[0]
    names: dict[Node, str] = {}
    for role, operand in roles.items():
        names.setdefault(operand, role)
    names[node] = "out"
    axes: dict[str, tuple[int, ...]] = {"query": (0, 1, 2), "key": (0, 1, 2), "value": (0, 1, 2)}
    axes |= {role: tuple(axis for axis in given if facts.beside.get(role) != axis) for role, given in facts.axes.items()}
    pointers = [(f"{role}_ptr", f"*{TRITON_TYPES[dtype_of(operand)]}") for role, operand in roles.items()]
    strides = [pair for role, operand in roles.items() for pair in stride_kinds(operand, role, axes[role])]
    heads, width = shape_of(node)[1], shape_of(node)[3]
    out = [("out_ptr", f"*{TRITON_TYPES[dtype_of(node)]}")]
    out += [(f"out_s{axis}", stride_kind(size)) for axis, size in ((0, width * heads), (1, width), (2, width * heads))]
    sizes = [("queries", "i32"), ("keys", "i32"), ("heads", "i32"), *([("pool", "i32")] if facts.pages is not None else [])]
    constants = [name for name in schedule if name.isupper()]
    if not facts.is_split:
        parameters = (*pointers, *out, *strides, *sizes)
        text = device_text(facts, kernel, parameters, constants)
        lines = (*_prepare(facts, names, schedule), *_launches(facts, kernel, parameters, options_of(schedule)))
        return Built(text, parameters, schedule, names, lines, reference(facts, names))
    shares = [("part_ptr", "*fp32"), ("level_ptr", "*fp32")]
    parameters = (*pointers, *shares, *strides, *sizes, ("splits", "i32"))
    second = (*shares, *out, ("queries", "i32"), ("heads", "i32"), ("splits", "i32"))
    options = {"BLOCK_SPLITS": MOST_SPLITS, "BLOCK_VALUE": schedule["BLOCK_VALUE"], "num_warps": 4}
    text = device_text(facts, kernel, parameters, constants) + combine_text(facts, kernel, second, ["BLOCK_SPLITS", "BLOCK_VALUE"])
    lines = (*_prepare(facts, names, schedule), *_split_launches(facts, kernel, (parameters, options_of(schedule)), second, options))
    part = Part(f"{kernel}_combine", second, options)
    return Built(text, parameters, schedule, names, lines, reference(facts, names), (part,))


Parameters = Sequence[tuple[str, str]]


def _prepare(facts: Facts, names: dict[Node, str], schedule: Schedule) -> list[str]:
    """Lines that bring operands into the layouts that are read, and make room for the result."""
    lines = [f"{role} = {names[operand]}" for role, operand in facts.roles.items() if names[operand] != role]
    lines += [f"{role} = laid({role}, 3, ())" for role in ("query", "key", "value")]
    lines += [f"{role} = laid({role}, {axis}, ())" for role, axis in facts.beside.items()]
    return [
        *lines,
        "batch, query_heads, queries, _ = query.shape",
        "heads, keys, width = value.shape[1:]",
        *(["pool, keys = key.shape[0], keys * pages.shape[1] if key.numel() > 0 else 0"] if facts.pages is not None else []),
        *(["schedule = known(SCHEDULE, query)"] if "maxnreg" in schedule else []),
        "out = torch.empty((batch, queries, query_heads, width), dtype=query.dtype, device=query.device).transpose(1, 2)",
    ]


def options_of(schedule: Schedule) -> str:
    """The last argument of a launch."""
    return "**schedule" if "maxnreg" in schedule else "**SCHEDULE"


def _launches(facts: Facts, kernel: str, parameters: Parameters, schedule: str) -> list[str]:
    rows = "queries" if facts.group == 1 else f"queries * {facts.group}"
    return [
        "if out.numel() > 0:",
        f'    programs = triton.cdiv({rows}, SCHEDULE["BLOCK_ROWS"]) * heads * batch',
        *_call(kernel, "programs", parameters, schedule),
    ]


def _split_launches(facts: Facts, kernel: str, first: tuple[Parameters, str], second: Parameters, options: Schedule) -> list[str]:
    rows = "queries" if facts.group == 1 else f"queries * {facts.group}"
    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    return [
        "if out.numel() > 0:",
        f'    programs = triton.cdiv({rows}, SCHEDULE["BLOCK_ROWS"]) * heads * batch',
        f'    splits = min({MOST_SPLITS}, triton.cdiv({PROGRAMS}, programs), triton.cdiv(max(keys, 1), SCHEDULE["BLOCK_KEYS"]))',
        f"    level = torch.empty((batch * heads * {rows}, splits), dtype=torch.float32, device=query.device)",
        f"    part = torch.empty((batch * heads * {rows}, splits, width), dtype=torch.float32, device=query.device)",
        *_call(kernel, "programs * splits", *first),
        *_call(f"{kernel}_combine", "level.shape[0]", second, shown),
    ]


def _call(kernel: str, programs: str, parameters: Parameters, options: str) -> list[str]:
    given = ", ".join([*(_argument(name) for name, _ in parameters), options])
    return [f"    {kernel}[({programs},)](", *wrapped(given, 2).splitlines(), "    )"]


def _argument(name: str) -> str:
    """What a launcher gives for a parameter: key_ptr -> key, key_s1 -> key.stride(1)."""
    if name.endswith("_ptr"):
        return name.removesuffix("_ptr")
    role, found, axis = name.rpartition("_s")
    return f"{role}.stride({axis})" if found else name


def reference(facts: Facts, names: dict[Node, str]) -> tuple[str, ...]:
    """Attention as it is defined, scores and all."""
    lines = [f"{role} = {names[operand]}" for role, operand in facts.roles.items() if names[operand] != role]
    if facts.pages is not None:
        lines += [f"{name} = {name}[pages].transpose(1, 2).flatten(2, 3)" for name in ("key", "value")]
    if facts.group > 1:
        lines += [f"{name} = {name}.repeat_interleave({facts.group}, 1)" for name in ("key", "value")]
    factor = facts.scale / (facts.softcap or 1.0)
    lines.append(f"scores = (query.float() @ key.float().transpose(-1, -2)) * {factor!r}")
    if facts.softcap:
        lines.append(f"scores = {facts.softcap!r} * torch.tanh(scores)")
    if facts.mask is not None:
        hidden = dtype_of(facts.mask) == "bool"
        lines.append('scores = scores.masked_fill(~mask, float("-inf"))' if hidden else "scores = scores + mask.float()")
    if facts.key_bias is not None:
        lines.append("scores = scores + key_bias.float()[:, None, None, :]")
    if facts.lengths is not None:
        lines.append("uncounted = torch.arange(key.shape[2], device=key.device) >= lengths[:, None, :, None]")
        lines.append('scores = scores.masked_fill(uncounted, float("-inf"))')
    if facts.left >= 0 or facts.right >= 0:
        lines.append("place = torch.arange(key.shape[2], device=key.device)")
        lines.append(f"distance = place - torch.arange(query.shape[2], device=key.device)[:, None] - {facts.offset}")
        near = [f"(distance <= {facts.right})"] if facts.right >= 0 else []
        near += [f"((distance >= {-facts.left}) | (place < {facts.sinks}))"] if facts.left >= 0 else []
        lines += [f"seen = {' & '.join(near)}", 'scores = scores.masked_fill(~seen, float("-inf"))']
    return (*lines, "out = (torch.nan_to_num(torch.softmax(scores, -1)) @ value.float()).to(query.dtype)")


ATTENTION = WholeOp("attention", refuses, goes_first, effort, schedules, build)
