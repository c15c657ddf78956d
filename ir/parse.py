"""The parser of the text form: `print_graph(parse_graph(text, constants)) == text`.

Every line is checked: the type that it states must be the one that its op computes. Symbolic sizes need a size to compute with while
the ops run on fake tensors; it is taken from the example inputs, or else tried from a few lists, for a size may collide with another one.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import symbol_of
from paretorch.ir.errors import ArtifactError, ParetorchError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import OPS
from paretorch.ir.text import SymbolNames, tensor_hash
from paretorch.ir.types import DTYPES, ScalarType, TensorType, Type, from_fake, parse_type, split_top_level

_HEADER = re.compile(r"graph ([^()]*)\((.*)\) -> ?(.*)$")
_CONSTANT = re.compile(r"const (\S+?)(?: = (.+))? : (\S+?)(?: # ([0-9a-f]+))?$")
_CALL = re.compile(r"([A-Za-z_]\w*) = ([\w:.]+)\((.*)\) : (.+)$")
_WORD = re.compile(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?<![\w.])\w[\w.]*(?!\w*\s*=)""")  # or a string, which stays
_NUMBERS = {"inf": math.inf, "nan": math.nan}
_SIZES: tuple[tuple[int, ...], ...] = (
    (11, 13, 17, 19, 23, 29),
    (192, 320, 448, 704, 832, 1088),
    (4, 6, 10, 14, 22, 26),
    (2, 3, 5, 7, 9, 12),
)
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": torch.sym_max, "Min": torch.sym_min, "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv, "slice": slice,
}  # fmt: skip


def parse_graph(text: str, constants: dict[str, Tensor] | None = None, example: Sequence[Tensor] | None = None) -> Graph:
    """The graph of a printed text; node names, origins and rules are not in the text.

    constants: the tensors of the const lines by name; zeros of the stated types if None. example: inputs whose sizes the symbolic
    sizes take while types are computed. Raises ArtifactError, with the number of the line that is damaged.
    """
    lines = text.rstrip("\n").split("\n")
    symbols = _symbols(lines[0])
    attempts = [_sizes_of(lines[0], example)] if example is not None else []
    attempts += [{name: sizes[i % len(sizes)] for i, name in enumerate(symbols)} for sizes in _SIZES]
    first: ArtifactError | None = None
    for sizes in attempts if symbols else [{}]:
        try:
            return _Parser(lines, constants, sizes).graph()
        except ArtifactError as error:
            first = first or error
    assert first is not None  # there is at least one attempt
    raise first


def _symbols(header: str) -> list[str]:
    """The symbols in the shapes of the header's inputs."""
    inside = "".join(re.findall(r"\[(.*?)\]", header))
    return sorted(set(re.findall(r"\bs\d+\b", inside)))


def _sizes_of(header: str, example: Sequence[Tensor]) -> dict[str, int]:
    """The sizes that the symbols of the header have in the example."""
    found, sizes = _HEADER.match(header), {}
    for declared, tensor in zip(split_top_level(found[2]) if found else (), example, strict=False):
        shape = re.search(r"\[(.*)\]", declared)
        for size, actual in zip(split_top_level(shape[1]) if shape else (), tensor.shape, strict=False):
            if re.fullmatch(r"s\d+", size) and int(actual) > 1:  # torch takes sizes 0 and 1 for fixed
                sizes[size] = int(actual)
    return sizes


class _Parser:
    def __init__(self, lines: list[str], constants: dict[str, Tensor] | None, sizes: dict[str, int]) -> None:
        self.lines, self.constants, self.sizes = lines, constants, sizes
        self.number = 1
        self.result = Graph("model")
        self.values: dict[str, Node] = {}
        self._numbered: dict[str, str] = {}
        self._by_number: dict[str, Node] = {}
        self.names = SymbolNames()

    def graph(self) -> Graph:
        """All lines. Raises ArtifactError."""
        header = self._match(_HEADER, self.lines[0], "graph name(x: f32[4,64]) -> v1")
        self.result.name = header[1]
        for declared in split_top_level(header[2]):
            name, _, type_text = declared.partition(": ")
            self._define(name, self._input(name, type_text))
        for number, line in enumerate(self.lines[1:], 2):
            self.number = number
            if line.startswith("const "):
                self._constant(self._match(_CONSTANT, line, "const weight : f32[64] # 5f70bf18a086"))
            else:
                self._call(self._match(_CALL, line, "v1 = mean(v0, dim=[-1], keepdim=True) : f32[4,1]"))
        self.number = 1
        self.result.set_outputs([self._value(self._python(value)) for value in split_top_level(header[3])])
        return self.result

    def _match(self, pattern: re.Pattern[str], line: str, form: str) -> re.Match[str]:
        found = pattern.match(line)
        if found is None:
            raise self._fault(f"{line[:80]!r} does not have the form {form!r}")
        return found

    def _fault(self, sentence: str) -> ArtifactError:
        return ArtifactError(f"line {self.number} of the graph's text: {sentence}; the text is damaged or was made by another version")

    def _define(self, name: str, node: Node) -> None:
        if name in self.values:
            raise self._fault(f"{name} is defined twice")
        self.values[name] = node
        self._numbered[name] = f"_value_{len(self.values)}"
        self._by_number[self._numbered[name]] = node

    # lines

    def _input(self, name: str, text: str) -> Node:
        if not name.isidentifier():
            raise self._fault(f"{name!r} is not the name of an input")
        type_ = self._type(text)
        node = self.result.input(name, self._fake(name, type_, text))
        self._check(name, node, text)
        return node

    def _fake(self, name: str, type_: Type, text: str) -> Any:
        if isinstance(type_, ScalarType):
            return symbol_of(self.result, name) if type_.kind == "int" else {"float": 0.5, "bool": True}[type_.kind]
        if not isinstance(type_, TensorType):
            raise self._fault(f"the input {name} is {text}; expected a tensor or a number")
        sizes = [self._value(self._python(size)) for size in split_top_level(text[text.index("[") + 1 : -1])]
        with self.result.fake_mode:
            return torch.empty(sizes, dtype=DTYPES[type_.dtype])

    def _constant(self, found: re.Match[str]) -> None:
        name, stated, mark = found[1], found[3], found[4]
        type_, key = self._type(stated), ast.literal_eval(found[2]) if found[2] else name
        if not isinstance(type_, TensorType) or not type_.is_static:
            raise self._fault(f"the constant {name} is {type_}; expected a tensor of known sizes")
        if self.constants is None:
            tensor = torch.zeros([int(size) for size in type_.shape], dtype=DTYPES[type_.dtype])
        elif key in self.constants:
            tensor = self.constants[key]
        else:
            raise self._fault(f"no tensor is given for the constant {key}")
        if str(from_fake(tensor)) != stated:
            raise self._fault(f"the constant {name} says {stated} but its tensor is {from_fake(tensor)}")
        if mark is not None and self.constants is not None and not tensor_hash(tensor).startswith(mark):
            raise self._fault(f"the constant {name} has hash {mark} but its tensor has {tensor_hash(tensor)[:12]}")
        self._define(name, self.result.add_constant(key, tensor))

    def _call(self, found: re.Match[str]) -> None:
        name, op, written, stated = found.groups()
        target = self._target(op)
        call = self._python(f"f({written})")
        if not isinstance(call, ast.Call):
            raise self._fault(f"cannot read the arguments {written!r}")
        given = [self._value(arg) for arg in call.args]
        named = {str(keyword.arg): self._value(keyword.value) for keyword in call.keywords}
        try:
            args, kwargs = _bind(target, given, named)
            node = self.result.call(target, args, kwargs)
        except (ParetorchError, TypeError) as error:
            raise self._fault(f"{op} cannot be called so: {error}") from error
        self._check(name, node, stated)
        self._define(name, node)

    def _check(self, name: str, node: Node, stated: str) -> None:
        found = self.names.type(from_fake(node.meta["val"]))
        if found != stated:
            raise self._fault(f"{name} says {stated} but its type is {found}")

    # parts of lines

    def _type(self, text: str) -> Type:
        try:
            return parse_type(text)
        except (ParetorchError, ValueError, SyntaxError, TypeError) as error:
            raise self._fault(str(error)) from error

    def _target(self, op: str) -> Any:
        row_name, _, rest = op.partition(":")
        if rest.startswith(":"):
            return self._opaque(row_name, rest[1:])
        if row_name not in OPS:
            raise self._fault(f"no op named {row_name!r} in the op table")
        for target in OPS[row_name].targets:
            if not rest or _overload(target) == rest:
                return target
        raise self._fault(f"the row {row_name} has no overload {rest!r}")

    def _opaque(self, namespace: str, name: str) -> Any:
        """An overload without a row, or a function of numbers."""
        if namespace == "python":
            places = (operator, math, torch, builtins)
            found = next((getattr(place, name) for place in places if callable(getattr(place, name, None))), None)
        else:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
        if found is None:
            raise self._fault(f"this version of torch has no op {namespace}::{name}")
        return found

    def _python(self, text: str) -> ast.expr:
        """The text as a Python expression, with the names of values, which may hold dots, replaced by numbered ones."""
        plain = _WORD.sub(lambda found: self._numbered.get(found[0], found[0]), text.strip())
        try:
            return ast.parse(plain, mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise self._fault(f"cannot read {text[:80]!r}") from error

    def _value(self, tree: ast.expr) -> Any:
        """What an argument stands for; only literals, names and arithmetic on sizes are read."""
        if isinstance(tree, ast.Constant):
            return _plain(tree.value)
        if isinstance(tree, ast.Name):
            return self._named(tree.id)
        if isinstance(tree, (ast.List, ast.Tuple)):
            return [self._value(item) for item in tree.elts]
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -self._value(tree.operand)
        if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
            return _BINARY[type(tree.op)](self._value(tree.left), self._value(tree.right))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS:
            return _FUNCTIONS[tree.func.id](*(self._value(arg) for arg in tree.args))
        raise self._fault(f"cannot read the value {ast.unparse(tree)[:80]!r}")

    def _named(self, name: str) -> Any:
        if name in self._by_number:
            return self._by_number[name]
        if name in _NUMBERS:
            return _NUMBERS[name]
        if name in DTYPES:
            return DTYPES[name]
        if re.fullmatch(r"s\d+", name):
            return symbol_of(self.result, name, self.sizes.get(name, 8))
        raise self._fault(f"{name} is used but not defined before")


def _overload(target: Any) -> str:
    """ "view.default" for aten.view.default; the name of a plain function."""
    if not hasattr(target, "_schema"):
        return str(getattr(target, "__name__", ""))
    return f"{target._schema.name.split('::')[-1]}.{target._overloadname}"


def _plain(value: Any) -> Any:
    """A literal; 'torch.channels_last' is what torch calls so."""
    if isinstance(value, str) and value.startswith("torch."):
        found = getattr(torch, value.removeprefix("torch."), None)
        return found if isinstance(found, (torch.memory_format, torch.layout)) else value
    return value


def _bind(target: Any, given: list[Any], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as export writes them: by place as far as the op takes them so. Raises TypeError."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return tuple(given), named
    named = {name: torch.device(value) if name == "device" and isinstance(value, str) else value for name, value in named.items()}
    placed = [parameter for parameter in schema.arguments if not parameter.kwarg_only]
    unknown = sorted(named.keys() - {parameter.name for parameter in schema.arguments})
    if unknown or len(given) > len(placed):
        raise TypeError(f"it takes no {unknown[0] if unknown else f'{len(given)} arguments by place'}")
    last = max((i for i, parameter in enumerate(placed) if parameter.name in named), default=-1)
    args = list(given)
    for parameter in placed[len(given) : last + 1]:
        if parameter.name not in named and not parameter.has_default_value():
            raise TypeError(f"it needs {parameter.name}")
        args.append(named.pop(parameter.name, parameter.default_value))
    return tuple(args), named
