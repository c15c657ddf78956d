"""Emission: the lines of a kernel that compute a region's values, each value as the function of one element's coordinates.

A value is pulled from what is written: elementwise ops ask for their operands at the same element, views and concatenations for other elements,
ops over rows for the whole row, reads are loads. A value that is needed at several coordinates is computed at each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from paretorch.codegen.coordinates import At, at_source, broadcast, divided, is_plain, plus, product, remainder, size_text, source_of, times
from paretorch.codegen.expressions import compute_type, converted, dtype_of, load, number, row_text, statement
from paretorch.codegen.layouts import Layout, layout_of, merged_axes
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import is_op

IDENTITY = {"sum": "0.0", "mean": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
COLUMN = "column"


@dataclass(frozen=True)
class Line:
    """One assignment of a kernel. is_load: whether it reads memory; reduction: over the row, of the text's value ("" if it is none)."""

    name: str
    text: str
    is_load: bool = False
    reduction: str = ""

    def __str__(self) -> str:
        if not self.reduction:
            return f"{self.name} = {self.text}"
        reduced = f"tl.{self.function}(tl.where(inside, {self.text}, {IDENTITY[self.reduction]}))"
        return f"{self.name} = {reduced}{' / WIDTH' if self.reduction == 'mean' else ''}"

    @property
    def function(self) -> str:
        return "sum" if self.reduction == "mean" else self.reduction

    @property
    def words(self) -> set[str]:
        """The names that its text uses."""
        return set(re.findall(r"[A-Za-z_]\w*", self.text))


@dataclass
class Space:
    """What a kernel runs over: elements of `shape`, or rows of it along the last axis, whose element is then at `column`.

    position: the flat number of the element, or of the row. at: the coordinate of an element, where axes that are passed over together have it at
    the last of them; lines: how it follows from the position. column: where in its row an element is.
    masks: (pattern of coordinates, the condition under which they are inside), for those that differ from element to element.
    """

    shape: tuple[Any, ...]
    is_rows: bool
    position: str
    at: At = ()
    lines: dict[str, str] = field(default_factory=dict)
    column: str = COLUMN
    masks: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.lead = self.shape[:-1] if self.is_rows else self.shape
        self.masks = self.masks or ((rf"\b{COLUMN}\b" if self.is_rows else r"\b(place|at_\d+)\b", "inside"),)

    def split(self, merged: set[int]) -> None:
        """Set coordinates. merged: axes that are passed over together with the next one."""
        groups: list[list[int]] = []
        for axis, size in enumerate(self.lead):
            if size == 1:
                continue
            if groups and groups[-1][-1] in merged:
                groups[-1].append(axis)
            else:
                groups.append([axis])
        at = [""] * len(self.shape)
        for place, group in enumerate(groups):
            at[group[-1]] = name = self.position if len(groups) == 1 else f"at_{group[-1]}"
            inner = product([self.lead[axis] for later in groups[place + 1 :] for axis in later])
            text = divided(self.position, inner)
            size = product([self.lead[axis] for axis in group])
            if name != self.position:
                self.lines[name] = text if place == 0 else remainder(text, size)
        if self.is_rows and self.shape[-1] != 1:
            at[-1] = self.column
        self.at = tuple(at)

    def row_at(self, shape: Sequence[Any]) -> At:
        """The coordinate of this row's number in a value with one number a row."""
        return (*self.at[:-1], "")[: len(shape)]


class Emitter:
    """Lines for the values of one region. evaluations: how many times each node is computed for an element."""

    def __init__(self, reads: tuple[Node, ...], names: dict[Node, str], space: Space) -> None:
        self.reads, self.names, self.space = reads, names, space
        self.layouts: dict[Node, Layout] = {node: layout_of(node, names[node]) for node in reads}
        self.merged: set[int] = set()  # axes that are passed over together with the next one
        self.lines: list[Line] = []
        self.given: dict[Node, Callable[[At], str]] = {}  # the texts of values that the template itself computes
        self.conditions: list[str] = []
        self.evaluations: Counter[Node] = Counter()
        self._known: dict[tuple[Node, At, str], str] = {}
        self._used: set[str] = set()

    def value(self, node: Node, at: At, mask: str = "") -> str:
        """The name of a variable that holds the node's element at this coordinate. Raises LoweringError if no line can be written for it."""
        if node in self.given:
            return self._once(node, at, mask, self._given)
        if node in self.layouts:
            return self._once(node, at, mask, self._load)
        source = source_of(node)
        if source is not None:
            return self.value(source, at_source(node, at), mask)
        if row_text(node) is not None:
            return self._once(node, at, mask, self._row)
        return self._once(node, at, mask, self._joined if is_op(node, "cat") else self._pointwise)

    def write(self, node: Node) -> str:
        """The variable of a result of this space, or of one number of a row."""
        shape = shape_of(node)
        return self.value(node, self.space.at if shape == self.space.shape else self.space.row_at(shape))

    def held(self, writes: Sequence[Node]) -> int:
        """The most values of an element that are held at the same time, if all are loaded first."""
        order = sorted(self.lines, key=lambda line: not line.is_load)
        last = {word: place for place, line in enumerate(order) for word in line.words}
        last |= {self.write(node): len(order) for node in writes}
        live = most = 0
        ends = Counter(last.get(line.name, place) for place, line in enumerate(order))
        for place in range(len(order)):
            live += 1
            most = max(most, live)
            live -= ends[place]
        return most

    def _once(self, node: Node, at: At, mask: str, make: Any) -> str:
        key = (node, at, mask)
        if key not in self._known:
            self.evaluations[node] += 1
            self._known[key] = make(node, at, mask)
        return self._known[key]

    def _line(self, wanted: str, text: str, **traits: Any) -> str:
        name, number_of = wanted, 2
        while name in self._used:
            name, number_of = f"{wanted}_{number_of}", number_of + 1
        self._used.add(name)
        self.lines.append(Line(name, text, **traits))
        return name

    def _given(self, node: Node, at: At, mask: str) -> str:
        if mask:
            raise LoweringError(f"{node.name} is joined with other parts; the template computes it whole")
        return self._line(self.names[node], self.given[node](at))

    def _load(self, node: Node, at: At, mask: str) -> str:
        offset = self.offset(node, at)
        masks = " & ".join(self.masks(offset, mask))
        return self._line(self.names[node], load(node, self.names[node], offset, masks), is_load=True)

    def masks(self, offset: str, mask: str = "") -> list[str]:
        """The conditions of a load; those on coordinates that the pointer does not have cannot matter."""
        texts = dict(line.split(" = ", 1) for line in self.conditions)
        absent = [pattern for pattern, _ in self.space.masks if not re.search(pattern, offset)]
        parts = [part for part in mask.split(" & ") if mask and not any(re.search(pattern, texts[part]) for pattern in absent)]
        return [condition for pattern, condition in self.space.masks if pattern not in absent] + parts

    def offset(self, node: Node, at: At) -> str:
        """The number of the node's element at this coordinate, counted from its first."""
        layout, space = self.layouts[node], self.space
        shape, lead = shape_of(node), len(space.lead)
        if layout.is_contiguous and shape[:lead] == space.lead and at[:lead] == space.at[:lead]:  # as it lies in memory
            rest = at[lead] if len(shape) > lead else ""
            return plus(times(space.position, product(shape[lead:])) if product(space.lead) != 1 else "", rest)
        return plus(*(times(text, stride) for text, stride in zip(at, layout.strides, strict=True)))

    def _pointwise(self, node: Node, at: At, mask: str) -> str:
        shape = shape_of(node)
        names = {operand: self.value(operand, broadcast(at, shape, shape_of(operand)), mask) for operand in node.all_input_nodes}
        return self._line(self.names[node], statement(node, names))

    def _joined(self, node: Node, at: At, mask: str) -> str:
        """A concatenation: each element comes from the one operand in whose part it lies."""
        given = arguments(node)
        parts, axis = list(given["tensors"]), given["dim"] % len(at)
        text, start, pieces = at[axis] or "0", 0, []
        for place, part in enumerate(parts):
            shape = shape_of(part)
            end = start + shape[axis]
            conditions = [f"{text} >= {size_text(start)}"] if place > 0 else []
            conditions += [f"{text} < {size_text(end)}"] if place < len(parts) - 1 else []
            within = self._condition(node, place, " and ".join(conditions)) if conditions else ""
            shifted = f"{text} - {_bracket(size_text(start))}" if place > 0 else at[axis]
            there = (*at[:axis], "" if shape[axis] == 1 else shifted, *at[axis + 1 :])
            both = " & ".join(part for part in (mask, within) if part)
            held = compute_type(dtype_of(node))
            pieces.append((within, converted(self.value(part, there, both), part, held)))
            start = end
        joined = pieces[-1][1]
        for within, piece in reversed(pieces[:-1]):
            joined = f"tl.where({within}, {piece}, {joined})"
        return self._line(self.names[node], joined)

    def _condition(self, node: Node, place: int, text: str) -> str:
        name = f"in_{self.names[node]}_{place}"
        texts = [f"({part})" for part in text.split(" and ")]
        line = f"{name} = {' & '.join(texts) if len(texts) > 1 else text}"
        if line not in self.conditions:
            while any(known.startswith(f"{name} = ") for known in self.conditions):
                name += "_"
            line = f"{name} = {line.split(' = ', 1)[1]}"
            self.conditions.append(line)
        return name

    def _row(self, node: Node, at: At, mask: str) -> str:
        if not self.space.is_rows or mask:
            raise LoweringError(f"{node.name} needs whole rows; here it is asked for single elements")
        text, given = row_text(node), arguments(node)
        assert text is not None  # `value` asked
        source: Node = given[text.row]
        shape = shape_of(source)
        kept = len(shape) - 1
        is_row = text.per_row or at[-1] == COLUMN or shape[-1] == 1
        crosses = any(re.search(rf"\b{COLUMN}\b", part) for part in at[:kept])  # a statistic of every column's own row
        if not is_row or crosses or shape[-1] != self.space.shape[-1]:
            raise LoweringError(
                f"the rows of {list(shape)} that {node.name} takes are not those of {list(self.space.shape)} that this kernel goes along"
            )
        full = (*at[:kept], COLUMN if shape[-1] != 1 else "")
        held = compute_type(dtype_of(node))
        words = {
            name: converted(self.value(value, broadcast(full, shape, shape_of(value))), value, held)
            if isinstance(value, Node)
            else number(value)
            for name, value in given.items()
            if isinstance(value, (Node, int, float))
        }
        made = ""
        steps = [step for step in text.steps if not step.only_with or given.get(step.only_with) is not None]
        for step in text.steps:
            if step in steps:
                wanted = self.names[node] if step is steps[-1] else step.name
                made = self._line(wanted, step.text.format(**words), reduction=step.reduction)
            words[step.name] = made
        return made


def _loses_axis(node: Node) -> bool:
    """Whether it has an axis less than its operand, so that axes are no longer counted from the right."""
    text = row_text(node)
    return text is not None and len(shape_of(node)) < len(shape_of(arguments(node)[text.row]))


def _bracket(text: str) -> str:
    return f"({text})" if re.search("[+-]", text) else text


def emitter_for(
    nodes: tuple[Node, ...], reads: tuple[Node, ...], names: dict[Node, str], shape: tuple[Any, ...], *, is_rows: bool
) -> Emitter:
    """An emitter over this space, with axes joined that every read passes over as one. Raises LoweringError for sizes that have no text."""
    odd = next((size for size in shape if not is_plain(size)), None)
    if odd is not None:
        raise LoweringError(f"the size {odd} is no sum or product of symbols")
    space = Space(shape, is_rows, "row" if is_rows else "place")
    emitter = Emitter(reads, names, space)
    moved = any(source_of(node) is not None or is_op(node, "cat") or _loses_axis(node) for node in nodes)
    emitter.merged = set() if moved else merged_axes(space.lead, shape, nodes, emitter.layouts)
    space.split(emitter.merged)
    return emitter
