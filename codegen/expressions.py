"""Triton text of one node, from the op table's `triton` column.

Values are held in their compute type: f32 for floats up to f32, f64 for f64, integers and truths as they are. Operands are converted as torch
promotes them.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.codegen.coordinates import is_plain, source_of
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import Missing, OpTemplate, RowText, is_op, op_of
from paretorch.ir.types import DTYPE_NAMES

TRITON_TYPES = {
    "f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8", "u8": "u8", "bool": "i1",
}  # fmt: skip
LANGUAGE_TYPES = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16",
    "i64": "tl.int64", "i32": "tl.int32", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1",
}  # fmt: skip
CONDITIONS = ("condition", "mask")  # arguments of these names stay truths
TORCH_S_OWN = (
    "keepdim",
    "dtype",
    "half_to_float",
    "cudnn_enable",
)  # arguments of row ops that the types tell, or that choose torch's kernel
RESERVED = {
    "tl", "triton", "torch", "os", "sys", "place", "inside", "count", "row", "column", "start", "shape", "device", "launch", "reference", "laid",
    "BLOCK", "WIDTH", "SCHEDULE", "EXAMPLES", "min", "max", "sum", "range", "float",
}  # fmt: skip
RESERVED_FORMS = re.compile(r"at_\d+|[su]\d+|in_.*|.*_ptr|.*_s\d+|.*_steps")


def dtype_of(node: Node) -> str:
    """The key of DTYPES; "" if the node makes no single tensor."""
    value = node.meta.get("val")
    return DTYPE_NAMES[value.dtype] if isinstance(value, Tensor) else ""


def compute_type(dtype: str) -> str:
    """The type in which values of this dtype are held."""
    return "f32" if dtype in ("f16", "bf16") else dtype


def row_text(node: Node) -> RowText | None:
    """The steps of an op over rows; None for any other op."""
    op = op_of(node)
    return op.triton if op is not None and isinstance(op.triton, RowText) else None


def not_expressible(node: Node) -> str | None:
    """None if the node has Triton text, as one element of each operand, as a row, or as a choice of places; otherwise a sentence."""
    op = op_of(node)
    if op is None:
        return f"{node.name} ({node.target}) has no row in the op table"
    if source_of(node) is not None:
        return None
    if dtype_of(node) not in TRITON_TYPES or any(dtype_of(argument) not in TRITON_TYPES for argument in node.all_input_nodes):
        return f"{node.name} computes with a type that the templates do not hold"
    if any(not is_plain(size) for size in shape_of(node)):
        return f"{node.name} has the shape {list(shape_of(node))}; the templates take sums and products of symbols"
    if is_op(node, "to"):
        return None
    if is_op(node, "cat"):
        return _not_joined(node)
    text = _text(node)
    if isinstance(text, RowText):
        return _not_a_row(node, text)
    if isinstance(text, OpTemplate):
        return f"{node.name} ({op.name}) is a kernel of its own"
    if not op.elementwise:
        return f"{node.name} ({op.name}) is not elementwise"
    if isinstance(text, Missing):
        return f"{op.name} has no Triton text: {text.reason}"
    if is_op(node, "logical_not", "logical_and", "logical_or") and any(dtype_of(argument) != "bool" for argument in node.all_input_nodes):
        return f"{node.name} ({op.name}) is of numbers; its Triton text is for truths"
    if is_op(node, "round", "floor", "ceil") and compute_type(dtype_of(node)) not in ("f32", "f64"):
        return f"{node.name} ({op.name}) is of whole numbers; its Triton text is for real ones"
    return _leftover(node, text)


def _not_joined(node: Node) -> str | None:
    """Why a concatenation cannot be computed element by element, if so."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or any(
        not isinstance(part, Node) or len(shape_of(part)) != len(shape_of(node)) for part in parts
    ):
        return f"{node.name} joins parts of several ranks"
    return None if len(parts) <= MOST_PARTS else f"{node.name} joins {len(parts)} parts; the templates choose among {MOST_PARTS}"


MOST_PARTS = 4


def _not_a_row(node: Node, text: RowText) -> str | None:
    """Why an op over rows cannot be computed from its steps, if so."""
    given, defaults = arguments(node), {parameter.name: parameter.default_value for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    source = given.get(text.row)
    if not isinstance(source, Node) or not shape_of(source):
        return f"{node.name} takes no row of a tensor"
    axis, rank = given.get(text.axis), len(shape_of(source))
    if text.axis == "normalized_shape":
        if len(axis) != 1:  # type: ignore[arg-type]
            return f"{node.name} normalises the last {len(axis)} axes; the template takes the last one"  # type: ignore[arg-type]
    elif (axis if isinstance(axis, (list, tuple)) else [axis]) not in ([rank - 1], [-1], (rank - 1,), (-1,)):
        return f"{node.name} goes along {text.axis}={axis} of {rank} axes; the template takes the last one"
    if dtype_of(node) not in ("f64", "f32", "f16", "bf16") or not isinstance(shape_of(source)[-1], int):
        return f"{node.name} has rows of {dtype_of(node)}[{shape_of(source)[-1]}]; the template takes real numbers and a fixed length"
    words = set(re.findall(r"\{(\w+)\}", " ".join(step.text for step in text.steps)))
    fixed = dict(text.fixed)
    if absent := [name for name in fixed if name not in given]:
        return f"{node.name} has no {absent[0]}; its Triton text is for {absent[0]}={fixed[absent[0]]}"
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            return f"{node.name} has {name}={value}; its Triton text is for {fixed[name]}"
        if name in words and name not in [step.only_with for step in text.steps] and not isinstance(value, (Node, int, float)):
            return f"{node.name} has {name}={value}; its Triton text takes a value or a number there"
        if name not in {*words, *fixed, *TORCH_S_OWN, text.axis} and value != defaults[name]:
            return f"{node.name} has {name}={value}, which its Triton text leaves out"
    return None


def _leftover(node: Node, text: str) -> str | None:
    """Why not, if the text leaves an argument unused that is not at its default, or an operand is no value and no number."""
    used = {int(place) for place in re.findall(r"\{(\d+)\}", text)}
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for place, (argument, value) in enumerate(zip(schema, arguments(node).values(), strict=True)):
        if place in used and not isinstance(value, (Node, int, float)):
            return f"{node.name} has {argument.name}={value}; its Triton text takes a value or a number there"
        if place not in used and not isinstance(value, str) and value != argument.default_value:
            return f"{node.name} has {argument.name}={value}, which its Triton text leaves out"
    return None


def _text(node: Node) -> str | RowText | OpTemplate | Missing:
    """The column's text; where it depends on an option (gelu's approximate) or on what is given (limits of a clamp), that of this node's."""
    op = op_of(node)
    assert op is not None  # not_expressible asked
    if isinstance(op.triton, dict):
        given = {name: value for name, value in list(arguments(node).items())[1:] if value is not None}
        option = next((value for value in given.values() if isinstance(value, str)), " and ".join(given))
        return op.triton.get(option, Missing(f"not for {option!r}"))
    return op.triton


def statement(node: Node, names: dict[Node, str]) -> str:
    """ "x + 1.0" for an elementwise node that `not_expressible` lets pass; names: of its operands."""
    if is_op(node, "to"):
        return _cast(names[node.all_input_nodes[0]], node.all_input_nodes[0], dtype_of(node))
    held = compute_type(dtype_of(node))
    if held == "bool":  # compared in the operands' common type
        held = compute_type(DTYPE_NAMES[_promoted(node)])
    operands = [_operand(value, names, "bool" if name in CONDITIONS else held) for name, value in arguments(node).items()]
    return str(_text(node)).format(*operands)


def _promoted(node: Node) -> torch.dtype:
    """The type in which torch compares."""
    values = [argument.meta["val"] if isinstance(argument, Node) else argument for argument in arguments(node).values()]
    numbers = [value for value in values if isinstance(value, (Tensor, int, float))]
    if len(numbers) == 1:
        return numbers[0].dtype  # type: ignore[union-attr]
    first, second = numbers[:2]
    found: torch.dtype = torch.result_type(first, second)
    return found


def _operand(value: Any, names: dict[Node, str], held: str) -> str:
    if not isinstance(value, Node):
        return number(value) if isinstance(value, (int, float)) else ""  # not_expressible: the text has no place for it
    return converted(names[value], value, held)


def converted(name: str, node: Node, held: str) -> str:
    """A variable of this node's value in the type that is computed with."""
    return name if compute_type(dtype_of(node)) == held else f"{name}.to({LANGUAGE_TYPES[held]})"


def _cast(name: str, source: Node, target: str) -> str:
    """A cast as torch makes it: through the narrow type, and back to the type that values are held in."""
    held = compute_type(target)
    if target == "bool":
        return f"{name} != 0"
    if held != target and dtype_of(source) != target:
        return f"{name}.to({LANGUAGE_TYPES[target]}).to({LANGUAGE_TYPES[held]})"
    return converted(name, source, held)


def number(value: float) -> str:
    """A number as source text."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(int(value)) if isinstance(value, bool) else repr(value)


def load(node: Node, name: str, offset: str, mask: str) -> str:
    """ "tl.load(x_ptr + place, mask=inside).to(tl.float32)"."""
    held = compute_type(dtype_of(node))
    text = f"tl.load({name}_ptr{f' + {offset}' if offset else ''}{f', mask={mask}' if mask else ''})"
    return text if held == dtype_of(node) else f"{text}.to({LANGUAGE_TYPES[held]})"


def unique_names(nodes: Iterable[Node], roles: Mapping[Node, str] | None = None, others: Collection[str] = ()) -> dict[Node, str]:
    """A Python name for each node: its own where that is free. roles: names that are given; others: those that a template uses itself."""
    names: dict[Node, str] = dict(roles or {})
    for node in nodes:
        if node in names:
            continue
        plain = re.sub(r"\W", "_", node.name)
        taken = plain in RESERVED or keyword.iskeyword(plain) or RESERVED_FORMS.fullmatch(plain) is not None
        name = f"{plain}_value" if taken else plain
        while name in others or name in names.values():
            name += "_"
        names[node] = name
    return names
