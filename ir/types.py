"""Types of values: what a fake tensor says, as a small plain value that prints.

f32[4,64] is a tensor; f32[s0,64] has a symbolic size; int is a size that is computed in the graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

from paretorch.ir.errors import ShapeError

Size: TypeAlias = Any  # int, or sympy.Expr where it is symbolic

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorType:
    """dtype: a key of DTYPES; shape: integers or sympy expressions in the graph's symbols."""

    dtype: str
    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Any:
        """Number of elements; an int, or a sympy expression if a size is symbolic."""
        total: Any = 1
        for size in self.shape:
            total = total * size
        return total

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> Any:
        return self.numel * self.itemsize

    @property
    def is_static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(str(size).replace(' ', '') for size in self.shape)}]"


@dataclass(frozen=True)
class ScalarType:
    """A number computed in the graph: kind "int", "float" or "bool"; expression is its value in the graph's symbols."""

    kind: str
    expression: Size | float | None = None

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class TupleType:
    """What an op with several outputs returns."""

    items: tuple[Type, ...]

    def __str__(self) -> str:
        return f"({', '.join(str(item) for item in self.items)})"


Type = TensorType | ScalarType | TupleType


def size_of(size: int | torch.SymInt) -> Size:
    """A plain int where the size is known, else its sympy expression."""
    if isinstance(size, int):
        return size
    expression = sympy.sympify(size.node.expr)
    return int(expression) if expression.is_Integer else expression


def from_fake(value: Any) -> Type:
    """The type of what a fake run produced: a tensor, a symbolic number, or a tuple or list of them."""
    if isinstance(value, torch.Tensor):
        return TensorType(DTYPE_NAMES[value.dtype], tuple(size_of(size) for size in value.shape))
    if isinstance(value, (torch.SymBool, bool)):
        return ScalarType("bool")
    if isinstance(value, (torch.SymInt, int)):
        return ScalarType("int", size_of(value))
    if isinstance(value, (torch.SymFloat, float)):
        return ScalarType("float")
    if isinstance(value, (tuple, list)):
        return TupleType(tuple(from_fake(item) for item in value))
    if value is None:
        return TupleType(())
    raise ShapeError(f"a value in the graph has type {type(value).__name__}; expected tensors, numbers or tuples of them")


_TENSOR = re.compile(r"(\w+)\[(.*)\]$")


def parse_type(text: str) -> Type:
    """The inverse of `str(type)`. Raises ShapeError."""
    text = text.strip()
    if text in ("int", "float", "bool"):
        return ScalarType(text)
    if text.startswith("(") and text.endswith(")"):
        return TupleType(tuple(parse_type(item) for item in split_top_level(text[1:-1])))
    found = _TENSOR.match(text)
    if not found or found[1] not in DTYPES:
        raise ShapeError(f"cannot read the type {text!r}; expected for example f32[4,64], with a dtype of {', '.join(DTYPES)}")
    return TensorType(found[1], tuple(_parse_size(size) for size in split_top_level(found[2])))


def _parse_size(text: str) -> Size:
    if text.isdigit():
        return int(text)
    names = re.findall(r"[A-Za-z_]\w*", text)
    return sympy.sympify(text, locals={name: sympy.Symbol(name, integer=True, positive=True) for name in names})


def split_top_level(text: str, separator: str = ",") -> list[str]:
    """Split at separators that stand outside of any bracket or quote."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    tail = text[start:]
    return [part.strip() for part in [*parts, tail] if part.strip()]
