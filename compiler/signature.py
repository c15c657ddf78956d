"""The calling convention of a captured model: from the user's arguments to flat tensors, and from flat results to the user's structure."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import sympy
from torch import Tensor
from torch.utils import _pytree as pytree

from paretorch.ir.errors import ArtifactError, InputError
from paretorch.ir.types import DTYPE_NAMES, DTYPES, size_of


@dataclass(frozen=True)
class Leaf:
    """One leaf of the flattened arguments: a tensor input of the graph, or a value that was fixed at capture.

    path: how the user names it ("images", "past[0].keys"); shape: None marks a size that may vary; value: what was fixed.
    symbols: for each size that may vary its expression ("s0", "2*s0"), "" for the others.
    """

    path: str
    is_tensor: bool
    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    value: Any = None
    symbols: tuple[str, ...] = ()


def _leaf(path: str, is_tensor: bool, dtype: str, shape: list[int | None], value: Any, symbols: list[str]) -> Leaf:
    """A leaf from its place in a file."""
    return Leaf(path, is_tensor, dtype, tuple(shape), value, tuple(symbols))


@dataclass
class Signature:
    """parameters: (name, has default, kind) of the model's forward; order: names bound at capture, positional ones first.

    outputs: for each leaf of the output its place in the graph's results, or the value that it always has.
    ranges: smallest and largest value of each symbol, None if there is no largest.
    """

    parameters: tuple[tuple[str, bool, str], ...]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    input_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    output_spec: pytree.TreeSpec
    outputs: tuple[tuple[str, Any], ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The graph's flat inputs. Raises InputError with the argument's name, what was expected and what was found."""
        if not kwargs and self._fits_plainly(args):
            return tuple(args)
        bound = self._bind(args, kwargs)
        structure = (tuple(bound[name] for name in self.positional), {name: bound[name] for name in self.keywords})
        found, spec = pytree.tree_flatten(structure)
        if spec != self.input_spec:
            raise InputError(f"the inputs are structured as {_brief(spec)}; the model was captured with {_brief(self.input_spec)}")
        return self.check([value for leaf, value in zip(self.leaves, found, strict=True) if self._is_input(leaf, value)])

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of an item of data, not checked: keyword inputs by name, in the graph's order, else in the order given.

        Values that were fixed at capture may be left out. Raises InputError for a name that is missing or that the model was captured without.
        """
        if not kwargs:
            return _tensors(args)
        names = (*self.positional, *self.keywords)
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        unknown = next((name for name in given if name not in names and not _same(self.defaults.get(name), given[name])), None)
        if unknown is not None:
            raise InputError(f"an item of data has {unknown!r}; the model was captured with {', '.join(names)}")
        needed = {re.split(r"[.\[]", leaf.path)[0] for leaf in self.leaves if leaf.is_tensor}
        missing = next((name for name in names if name in needed and name not in given), None)
        if missing is not None:
            raise InputError(f"an item of data lacks {missing!r}; it has {', '.join(given)}")
        return _tensors([given[name] for name in names if name in given])

    def check(self, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
        """Dtypes and shapes. Raises InputError."""
        expected = [leaf for leaf in self.leaves if leaf.is_tensor]
        if len(tensors) != len(expected):
            raise InputError(
                f"{len(tensors)} tensors were given; the captured model takes {len(expected)}: {', '.join(e.path for e in expected)}"
            )
        for leaf, tensor in zip(expected, tensors, strict=True):
            _check_leaf(leaf, tensor)
        if self.ranges:
            check_sizes(expected, tensors, self.ranges)
        return tuple(tensors)

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's own output structure from the graph's flat results."""
        if self._lone_result is not None:
            return results[self._lone_result]
        leaves = [results[value] if kind == "result" else value for kind, value in self.outputs]
        return pytree.tree_unflatten(leaves, self.output_spec)

    @property
    def is_dynamic(self) -> bool:
        return any(size is None for leaf in self.leaves for size in leaf.shape)

    # Small models take a few milliseconds, of which binding and rebuilding structures was 4 %: the plain cases have a short way.

    @cached_property
    def _plain(self) -> tuple[tuple[Any, tuple[int | None, ...]], ...] | None:
        """(dtype, shape) of each input, where each positional parameter is one tensor of fixed shape and there is nothing else."""
        spec = pytree.tree_structure((tuple(0 for _ in self.positional), {}))
        if self.keywords or self.is_dynamic or spec != self.input_spec or not all(leaf.is_tensor for leaf in self.leaves):
            return None
        return tuple((DTYPES[leaf.dtype], leaf.shape) for leaf in self.leaves) if all(e.dtype in DTYPES for e in self.leaves) else None

    def _fits_plainly(self, args: Sequence[Any]) -> bool:
        expected = self._plain
        if expected is None or len(args) != len(expected):
            return False
        return all(isinstance(x, Tensor) and x.dtype is want and x.shape == shape for x, (want, shape) in zip(args, expected, strict=True))

    @cached_property
    def _lone_result(self) -> int | None:
        """The place of the one tensor that the model returns, if it returns just that."""
        is_lone = self.output_spec == pytree.tree_structure(0) and len(self.outputs) == 1 and self.outputs[0][0] == "result"
        return int(self.outputs[0][1]) if is_lone else None

    def to_json(self) -> str:
        """Raises ArtifactError if the structure holds a type that cannot be written as JSON."""
        try:
            return json.dumps({
                "parameters": [list(p) for p in self.parameters], "positional": list(self.positional), "keywords": list(self.keywords),
                "input_spec": pytree.treespec_dumps(self.input_spec), "output_spec": pytree.treespec_dumps(self.output_spec),
                "leaves": [[e.path, e.is_tensor, e.dtype, list(e.shape), e.value, list(e.symbols)] for e in self.leaves],
                "outputs": [list(o) for o in self.outputs], "defaults": self.defaults, "ranges": self.ranges,
            }, indent=1)  # fmt: skip
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ArtifactError(f"the model's inputs or outputs cannot be written to a file: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Raises ArtifactError if a type of the structure is not known here (import the library that defines it first)."""
        body = json.loads(text)
        try:
            specs = [pytree.treespec_loads(body[name]) for name in ("input_spec", "output_spec")]
        except Exception as error:  # torch raises several kinds here
            raise ArtifactError(
                f"the output structure needs a type that is not loaded ({error}); import its library, then load again"
            ) from error
        return cls(
            tuple((name, has, kind) for name, has, kind in body["parameters"]), tuple(body["positional"]), tuple(body["keywords"]), specs[0],
            tuple(_leaf(*leaf) for leaf in body["leaves"]), specs[1],
            tuple((kind, value) for kind, value in body["outputs"]), body["defaults"],
            {name: (low, high) for name, (low, high) in body["ranges"].items()},
        )  # fmt: skip

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, as the model's own forward would bind them."""
        names = [name for name, _, kind in self.parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
        names += self.positional[len(names) :]  # what went into *args
        if len(args) > len(names):
            raise InputError(f"{len(args)} positional inputs were given; the model takes {len(names)}: {', '.join(names)}")
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in bound or name not in {p[0] for p in self.parameters} | set(self.keywords):
                raise InputError(f"unexpected input {name!r}; the model takes {', '.join(p[0] for p in self.parameters)}")
            bound[name] = value
        wanted = {*self.positional, *self.keywords}
        for name in wanted - set(bound):
            if name not in self.defaults:
                raise InputError(
                    f"the input {name!r} is missing; the model was captured with {', '.join([*self.positional, *self.keywords])}"
                )
            bound[name] = self.defaults[name]
        for name in set(bound) - wanted:
            if not _same(self.defaults.get(name), bound[name]):
                raise InputError(f"the input {name!r} was not given when the model was captured; give it in example_inputs to use it")
        return bound

    def _is_input(self, leaf: Leaf, value: Any) -> bool:
        if not leaf.is_tensor and not _same(leaf.value, value):
            raise InputError(
                f"{leaf.path} is {value!r}; the model was captured with {leaf.value!r}, which is fixed: optimize again with it"
            )
        return leaf.is_tensor


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _same(fixed: Any, given: Any) -> bool:
    return fixed is given or (type(fixed) is type(given) and not isinstance(given, Tensor) and bool(fixed == given))


def check_sizes(leaves: Sequence[Leaf], tensors: Sequence[Tensor], ranges: Mapping[str, tuple[int, int | None]]) -> None:
    """Sizes that vary must be equal where the model was captured with equal ones, and in range. Raises InputError."""
    found: dict[str, tuple[int, str]] = {}
    for leaf, tensor in zip(leaves, tensors, strict=True):
        for axis, (expression, size) in enumerate(zip(leaf.symbols, tensor.shape, strict=True)):
            if not expression:
                continue
            place, (symbol, value) = f"axis {axis} of {leaf.path}", solved(expression, size)
            if symbol and value is None:
                raise InputError(f"{place} is {size}; expected a size of the form {expression}")
            if value is None:
                continue
            first, where = found.setdefault(symbol, (value, place))
            if value != first:
                raise InputError(f"{place} is {size}, which does not go with {where}; the model was captured with sizes that vary together")
            low, high = ranges.get(symbol, (0, None))
            if value < low or (high is not None and value > high):
                raise InputError(f"{place} is {size}; dynamic_shapes allows {low} to {'any' if high is None else high} for {expression}")


@lru_cache(maxsize=4096)
def solved(expression: str, size: int) -> tuple[str, int | None]:
    """(symbol, its value) where an expression of one symbol has this size; ("", None) for expressions of several."""
    if expression.isidentifier():
        return expression, size
    parsed = sympy.sympify(expression)
    if len(parsed.free_symbols) != 1:
        return "", None
    (symbol,) = parsed.free_symbols
    values = [value for value in sympy.solve(sympy.Eq(parsed, size), symbol) if value.is_Integer]
    return str(symbol), int(values[0]) if values else None


def _check_leaf(leaf: Leaf, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{leaf.path} is {type(tensor).__name__}; expected a tensor {_expected(leaf)}")
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    fits = tensor.ndim == len(leaf.shape) and all(want in (None, have) for want, have in zip(leaf.shape, tensor.shape, strict=True))
    if dtype != leaf.dtype or not fits:
        found = f"{dtype}[{','.join(map(str, tensor.shape))}]"
        advice = (
            "sizes are fixed at capture: optimize again for this shape, or give dynamic_shapes={...}"
            if dtype == leaf.dtype
            else "convert it"
        )
        raise InputError(f"{leaf.path} is {found}; expected {_expected(leaf)}; {advice}")


def _expected(leaf: Leaf) -> str:
    return f"{leaf.dtype}[{','.join('any' if size is None else str(size) for size in leaf.shape)}]"


def _brief(spec: pytree.TreeSpec) -> str:
    return str(spec).replace("\n", "")[:200]


def parameters_of(forward: Callable[..., Any]) -> tuple[tuple[tuple[str, bool, str], ...], dict[str, Any]]:
    """(name, has default, kind) of every parameter, and the defaults."""
    found, defaults = [], {}
    for name, parameter in inspect.signature(forward).parameters.items():
        has = parameter.default is not inspect.Parameter.empty
        found.append((name, has, parameter.kind.name))
        if has:
            defaults[name] = parameter.default
    return tuple(found), defaults


def leaf_of(path: str, value: Any, fake: Any) -> Leaf:
    """fake: the graph input's fake tensor, None if the value is fixed."""
    if not isinstance(value, Tensor):
        return Leaf(path, False, value=value)
    sizes = fake.shape if isinstance(fake, Tensor) else value.shape
    found = [size_of(size) for size in sizes]
    shape = tuple(size if isinstance(size, int) else None for size in found)
    symbols = tuple("" if isinstance(size, int) else str(size) for size in found)
    return Leaf(path, True, DTYPE_NAMES.get(value.dtype, str(value.dtype)), shape, None, symbols)
