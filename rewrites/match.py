"""The pattern matcher: a small graph with variables, written as code against a builder, found in a graph.

    def pattern(b: Builder, x: Value, weight: Weight, eps: float) -> Value:
        return b.mul(b.rms_norm(x, [8], None, eps), weight)

The function runs once against a recorder. Its parameters are the variables; the annotation says what one may stand for: `Value` any node, `Weight` a
constant of the graph, `float`, `int` or `bool` a number, `Const` any attribute (a list, a dtype, a number, None); with `| None` it may be absent.
Attributes that the pattern does not give must have their defaults. Matching goes backwards from the result; operands of commutative ops are tried
both ways. A pattern that returns several values has the first as its root, and the others are inner values that the replacement gives as well.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch.fx import Node

from paretorch.ir.errors import RuleError
from paretorch.ir.graph import Graph, arguments
from paretorch.ir.ops import Op, op_of, row

Value = Node


class Weight:
    """Annotation of a variable that stands for a constant of the graph, a get_attr node."""


class Const:
    """Annotation of a variable that stands for an attribute: anything but a node."""


@dataclass(frozen=True, eq=False)
class Variable:
    """A parameter of a pattern. kinds: the classes of its annotation."""

    name: str
    kinds: tuple[type, ...]

    def accepts(self, value: Any) -> bool:
        """Whether it may stand for this node or attribute."""
        if value is None:
            return NoneType in self.kinds or Const in self.kinds
        if isinstance(value, Node):
            return Node in self.kinds or (Weight in self.kinds and value.op == "get_attr")
        return Const in self.kinds or type(value) in self.kinds or (type(value) is int and float in self.kinds)


@dataclass(frozen=True, eq=False)
class Step:
    """One op of a pattern. given: its arguments by name of the schema; a value is a Step, a Variable or a plain attribute."""

    op: Op
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Pattern:
    """What a pattern function recorded: variables, and outputs of which the first is the root."""

    variables: tuple[Variable, ...]
    outputs: tuple[Step, ...]
    size: int  # ops

    @property
    def root(self) -> Step:
        return self.outputs[0]


class _Recorder:
    """Stands for the builder while a pattern function runs."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Callable[..., Step]:
        op = row(name)

        def record(*args: Any, **kwargs: Any) -> Step:
            self.count += 1
            names = [parameter.name for parameter in op.targets[0]._schema.arguments]
            return Step(op, {**dict(zip(names, args, strict=False)), **kwargs})

        return record


def record(function: Callable[..., Any]) -> Pattern:
    """The pattern that a function writes. Raises RuleError for an annotation that says nothing to the matcher."""
    hints = typing.get_type_hints(function)
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    variables = tuple(Variable(name, _kinds(function, name, hints.get(name))) for name in names)
    recorder = _Recorder()
    result = function(recorder, *variables)
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if not all(isinstance(step, Step) for step in outputs):
        raise RuleError(f"{function.__module__}.{function.__name__} returns {result!r}; expected the values of ops")
    return Pattern(variables, outputs, recorder.count)


def _kinds(function: Callable[..., Any], name: str, hint: Any) -> tuple[type, ...]:
    kinds = typing.get_args(hint) or (hint,)
    known = {Node, Weight, Const, float, int, bool, NoneType}
    if not set(kinds) <= known:
        expected = "Value, Weight, Const, float, int, bool or None"
        raise RuleError(f"{function.__module__}.{function.__name__}: the variable {name!r} is annotated {hint}; expected {expected}")
    return kinds


@dataclass(frozen=True)
class Match:
    """One binding of a pattern's variables: m.x is the node, m.eps the number. nodes: the matched ones, in order of the graph."""

    graph: Graph
    root: Node
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.values:
            raise AttributeError(f"the pattern has no variable {name!r}; it has {', '.join(self.values)}")
        return self.values[name]

    def escapes(self) -> Node | None:
        """The first inner value, not an output of the pattern, that a node outside of the match uses."""
        inside = set(self.nodes)
        inner = (node for node in self.nodes if node not in self.outputs)
        return next((node for node in inner if any(user not in inside for user in node.users)), None)


@dataclass(frozen=True)
class Miss:
    """How far a pattern got at a node: ops that fitted of all, and what did not."""

    root: str
    fitted: int
    of: int
    reason: str

    def __str__(self) -> str:
        return f"{self.fitted} of {self.of} ops of the pattern fit at {self.root}: {self.reason}"


Bound = dict[Any, Any]  # Step -> node, Variable -> node or attribute


def match_at(pattern: Pattern, graph: Graph, root: Node) -> Match | Miss:
    """The match whose root is this node, or the farthest that any attempt got."""
    attempt = _Attempt(root)
    for bound in attempt.step(pattern.root, root, {}):
        nodes = {value for key, value in bound.items() if isinstance(key, Step)}
        outputs = tuple(bound[step] for step in pattern.outputs)
        found = Match(graph, root, tuple(sorted(nodes)), outputs, {variable.name: bound[variable] for variable in pattern.variables})
        circle = _circle(found)
        if circle is None:
            return found
        attempt.miss(bound, f"{circle.name} is an operand, and computed from a value of the pattern")
    return Miss(root.name, attempt.fitted, pattern.size, attempt.reason)


def matches(pattern: Pattern, graph: Graph) -> Iterator[Match | Miss]:
    """A match or miss for every node of the root's op, in order of the graph."""
    for node in graph.calls:
        if op_of(node) is pattern.root.op:
            yield match_at(pattern, graph, node)


class _Attempt:
    """The search from one root; remembers the farthest failure."""

    def __init__(self, root: Node) -> None:
        self.root, self.fitted, self.reason = root, -1, ""

    def miss(self, bound: Bound, reason: str) -> None:
        fitted = sum(isinstance(key, Step) for key in bound)
        if fitted > self.fitted:
            self.fitted, self.reason = fitted, reason

    def step(self, step: Step, node: Any, bound: Bound) -> Iterator[Bound]:
        """Every way in which the op at `node` is this step."""
        if step in bound:
            if bound[step] is node:
                yield bound
            return
        op = op_of(node) if isinstance(node, Node) else None
        if op is not step.op:
            self.miss(bound, f"{_describe(node)} stands where the pattern has {step.op.name}")
            return
        pairs = _pairs(step, node)
        if pairs is None:
            self.miss(bound, f"{_describe(node)} has an attribute that the pattern leaves at its default")
            return
        bound = {**bound, step: node}
        yield from self.all(pairs, node, bound)
        if op.commutative and len(pairs) >= 2:
            (left, one), (right, other), *rest = pairs
            yield from self.all([(left, other), (right, one), *rest], node, bound)

    def all(self, pairs: list[tuple[Any, Any]], node: Node, bound: Bound) -> Iterator[Bound]:
        """Every way in which all pairs of a pattern's and a node's argument fit."""
        if not pairs:
            yield bound
            return
        (wanted, found), *rest = pairs
        for one in self.one(wanted, found, node, bound):
            yield from self.all(rest, node, one)

    def one(self, wanted: Any, found: Any, node: Node, bound: Bound) -> Iterator[Bound]:
        if isinstance(wanted, Step):
            yield from self.step(wanted, found, bound)
        elif isinstance(wanted, Variable):
            yield from self.variable(wanted, found, node, bound)
        elif isinstance(wanted, (list, tuple)):
            if isinstance(found, (list, tuple)) and len(found) == len(wanted):
                yield from self.all(list(zip(wanted, found, strict=True)), node, bound)
            else:
                self.miss(bound, f"{node.name} has {found!r} where the pattern has {list(wanted)!r}")
        elif _equal(wanted, found):
            yield bound
        else:
            self.miss(bound, f"{node.name} has {found!r} where the pattern has {wanted!r}")

    def variable(self, wanted: Variable, found: Any, node: Node, bound: Bound) -> Iterator[Bound]:
        if wanted in bound:
            if _equal(bound[wanted], found):
                yield bound
            else:
                self.miss(bound, f"{_describe(found)} stands for {wanted.name} in {node.name}, {_describe(bound[wanted])} elsewhere")
        elif wanted.accepts(found):
            yield {**bound, wanted: found}
        else:
            self.miss(bound, f"{_describe(found)} in {node.name} cannot stand for {wanted.name}")


def _pairs(step: Step, node: Node) -> list[tuple[Any, Any]] | None:
    """The pattern's and the node's arguments side by side; None if one that the pattern does not give has no default value."""
    found = arguments(node)
    wanted = dict(step.given)
    if not set(wanted) <= set(found):  # another overload with other names: by place
        wanted = dict(zip(found, wanted.values(), strict=False))
    defaults = {parameter.name: parameter for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    for name, value in found.items():
        if name not in wanted and not _equal(defaults[name].default_value, value):
            return None
    return [(wanted[name], found[name]) for name in found if name in wanted]


def _circle(match: Match) -> Node | None:
    """An operand of a match with several outputs that is computed from one of its values: its replacement would need itself."""
    operands = {value for value in match.values.values() if isinstance(value, Node)}
    if len(match.outputs) == 1 or not operands:
        return None
    reached, node, last = set(match.nodes), match.nodes[0], max(operands)
    while node <= last:
        if node not in reached and any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
        if node in operands and node in reached:
            return node
        node = node.next
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _describe(value: Any) -> str:
    if not isinstance(value, Node):
        return repr(value)
    op = op_of(value)
    return f"{value.name} ({op.name if op is not None else value.op})"
