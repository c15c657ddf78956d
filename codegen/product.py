"""Products with a weight matrix as one kernel, with what is computed elementwise before and after: what the template takes and the lines it needs.

A program has a sum for each place at which a product is needed: one where the product itself is, two for the halves of a packed gate, or for two
products of the same x. All go along K together, so that x is read once and a value as wide as the packed weight is never written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch.fx import Node

from paretorch.codegen.coordinates import At, is_plain, plus, product, source_of
from paretorch.codegen.emission import COLUMN, Emitter, Space
from paretorch.codegen.expressions import TRITON_TYPES, dtype_of, not_expressible, row_text, unique_names
from paretorch.codegen.kernel import Region, Schedule
from paretorch.codegen.layouts import layout_of, merged_axes
from paretorch.codegen.schedules import ALL_REGISTERS, FEW_ROWS, LEAST_BLOCK, product_schedules, split_schedules
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.whole_op import template_name
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import OpTemplate, is_op, op_of
from paretorch.ir.types import DTYPES

PLAIN, SPLIT = "product", "split_product"  # the templates: each sum by one program, or by several
HELD = ("f32", "f16", "bf16")
MOST_READS = 16  # operands of one kernel
MOST_NODES = 32
MOST_SUMS = 2
ENDS = ("", "_1")  # of what belongs to each sum
LOCALS = (  # what the template's own text calls its values
    "program", "row_blocks", "column_blocks", "first", "high", "total", "step", "along", "within", "left", "right", "part",
    "rows", "programs", "schedule", "few", "wide", "unpacked", "total_1", "right_1", "begin", "split", "share",
)  # fmt: skip
ROWS, COLUMNS = (r"\b(row|at_\d+)\b", "in_rows"), (r"\bcolumn\b", "in_columns")
INNER = (r"\binner\b", "in_inner")


@dataclass(frozen=True)
class Operands:
    """What a product multiplies. weight: [N, K], or [K, N] if it is turned, [N, G, K / G / 2] if it is packed; scale: of groups of K; None where
    there is none."""

    x: Node
    weight: Node
    scale: Node | None
    bias: Node | None
    is_turned: bool
    is_packed: bool = False

    @property
    def columns(self) -> Any:
        return shape_of(self.weight)[1 if self.is_turned else 0]

    @property
    def inner(self) -> Any:
        if self.is_packed:
            return 2 * product(shape_of(self.weight)[1:])
        return shape_of(self.weight)[0 if self.is_turned else 1]

    @property
    def groups(self) -> int:
        return int(shape_of(self.scale)[1]) if self.scale is not None else 1


@dataclass(frozen=True)
class Sum:
    """What a program adds up for its block of columns. column: the text of the product's column that belongs to one of the block; end: of its names."""

    given: Operands
    column: str
    end: str


def operands_of(node: Node) -> Operands:
    """The arguments of a product, by the roles that its row of the op table gives them."""
    op, given = op_of(node), arguments(node)
    assert op is not None  # a node of a row of the table
    assert isinstance(op.triton, OpTemplate)
    found = {role: given[name] for role, name in op.triton.roles if given.get(name) is not None}
    turned, packed = "turned_weight" in found, "packed_weight" in found
    weight = found["turned_weight" if turned else "packed_weight" if packed else "weight"]
    return Operands(found["x"], weight, found.get("scale"), found.get("bias"), turned, packed)


def refuses(node: Node) -> str | None:
    """None, or why the template does not take this product by itself."""
    given = operands_of(node)
    x, weight, dtype = shape_of(given.x), shape_of(given.weight), dtype_of(given.x)
    held = "u8" if given.is_packed else "i8" if given.scale is not None else dtype
    if dtype not in HELD or dtype_of(node) != dtype or dtype_of(given.weight) != held:
        return (
            f"{node.name} is of {dtype} and {dtype_of(given.weight)}; the template takes one of {', '.join(HELD)}, or such with scaled i8"
        )
    if len(weight) != 2 + given.is_packed or not x or not all(isinstance(size, int) and size > 0 for size in weight):
        return f"{node.name} multiplies {list(x)} by {list(weight)}; the template takes rows by a matrix of known sizes"
    if x[-1] != given.inner or shape_of(node) != (*x[:-1], given.columns) or not all(map(is_plain, x)):
        return f"{node.name} makes {list(shape_of(node))} of {list(x)} and {list(weight)}; the template takes [..., K] and makes [..., N]"
    for name, operand in (("scale", given.scale), ("bias", given.bias)):
        if operand is not None and dtype_of(operand) not in HELD:
            return f"{node.name} has a {name} of {dtype_of(operand)}; the template takes {', '.join(HELD)}"
    if given.bias is not None and shape_of(given.bias) != (given.columns,):
        return f"{node.name} has a bias of {list(shape_of(given.bias))}; the template takes {[given.columns]}"
    if given.scale is not None and (shape_of(given.scale)[:-1] != (given.columns,) or given.groups < 1 or given.inner % given.groups):
        return (
            f"{node.name} has scales of {list(shape_of(given.scale))}; the template takes {[given.columns]} by a divisor of {given.inner}"
        )
    if given.is_packed and not layout_of(given.weight, "").is_contiguous:
        return f"{node.name} reads packed weights that do not lie in order"
    if given.is_packed and given.inner // given.groups % LEAST_BLOCK:
        return f"{node.name} has packed groups of {given.inner // given.groups}; the template takes multiples of {LEAST_BLOCK}"
    return None


def joins(region: Region) -> str | None:
    """None, or why this product and the nodes beside it are not one kernel."""
    try:
        return Fused(region).refusal
    except LoweringError as error:
        return str(error)


@dataclass(frozen=True)
class Fused:
    """A region of products of one x and elementwise nodes before and after them, and the lines that compute these. Raises LoweringError."""

    region: Region

    @cached_property
    def products(self) -> dict[Node, Operands]:
        """In graph order; `given` is the first one's."""
        return {node: operands_of(node) for node in self.region.nodes if template_name(node) == PLAIN}

    @cached_property
    def given(self) -> Operands:
        return next(iter(self.products.values()))

    @cached_property
    def names(self) -> dict[Node, str]:
        """Of all values: those that are multiplied by their roles, others by their own names."""
        roles: dict[Node, str] = {}
        for given, end in zip(self.products.values(), ENDS, strict=False):  # more of them are refused
            for role in ("x", "weight", "scale", "bias"):
                operand = getattr(given, role)
                if operand is not None and operand in self.region.reads:
                    roles.setdefault(operand, f"{role}{end}")
        return unique_names([*self.region.reads, *self.region.nodes], roles, LOCALS)

    @property
    def rows(self) -> int | None:
        """How many there are, None if it varies."""
        found = product(self.region.shape[:-1])
        return found if isinstance(found, int) else None

    @property
    def columns(self) -> int:
        """Of each sum."""
        return int(self.region.shape[-1])

    def before(self, *, is_whole: bool) -> Emitter:
        """The lines that make a block of x, as it is multiplied. is_whole: whether blocks divide K, so that no place along it is outside."""
        masks = (ROWS,) if is_whole else (ROWS, INNER)
        emitter = self._emitter(Space(shape_of(self.given.x), True, "row", column="inner", masks=masks))
        emitter.value(self.given.x, emitter.space.at)
        return emitter

    @property
    def after(self) -> Emitter:
        """The lines that make what is written of the sums, which are called `total` and `total_1`."""
        return self._summed[0]

    @property
    def sums(self) -> Sequence[Sum]:
        """In the order in which the lines need them."""
        return self._summed[1]

    @cached_property
    def _summed(self) -> tuple[Emitter, list[Sum]]:
        emitter = self._emitter(Space(self.region.shape, True, "row", masks=(ROWS, COLUMNS)))
        sums: list[Sum] = []

        def taken(node: Node, at: At) -> str:
            column = self._column(node, at, emitter.space)
            if len(sums) == MOST_SUMS:
                raise LoweringError(f"{node.name} would be a program's sum {MOST_SUMS + 1}; the template holds {MOST_SUMS}")
            given, end = self.products[node], ENDS[len(sums)]
            sums.append(Sum(given, column, end))
            return plus(f"total{end}", emitter.value(given.bias, at[-1:]) if given.bias is not None else "")

        emitter.given = {node: partial(taken, node) for node in self.products}
        for node in self.region.writes:
            emitter.write(node)
        return emitter, sums

    @staticmethod
    def _column(node: Node, at: At, space: Space) -> str:
        """The column of a product that is needed there. Raises LoweringError where it does not follow from the program's row and column alone."""
        column, is_one = at[-1], space.shape[-1] == 1
        if at[:-1] != space.at[:-1] or re.search(ROWS[0], column) or (re.search(COLUMNS[0], column) is None and not is_one):
            raise LoweringError(f"{node.name} is needed at other places than those where a program computes it")
        return plus(COLUMN, column) if is_one else column

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The block sizes that fit, the best first."""
        return self.schedules_for(self.rows)

    def schedules_for(self, rows: int | None) -> tuple[Schedule, ...]:
        """Those for so many rows, None if they vary."""
        given = self.given
        itemsize, length = DTYPES[dtype_of(given.x)].itemsize, given.inner // given.groups
        is_scaled = given.groups > 1 or given.is_packed
        found = product_schedules(itemsize, rows, self.columns, length, self.held, is_scaled=is_scaled, sums=len(self.sums))
        if given.is_packed:
            found = tuple({**options, **ALL_REGISTERS} for options in found)
        if self.region.template == PLAIN:
            return found
        return split_schedules(found, rows, self.columns, length, given.groups) if rows is not None else ()

    @property
    def held(self) -> int:
        """How many values of an element are held at once."""
        return max(self.after.held(self.region.writes), 1 + len(self.sums))

    def _emitter(self, space: Space) -> Emitter:
        """Both spaces go along the same rows, so that axes which one passes over together are so in the other."""
        region, others = self.region, {operand for given in self.products.values() for operand in (given.weight, given.scale)}
        emitter = Emitter(region.reads, self.names, space)
        moved = any(source_of(node) is not None or is_op(node, "cat") for node in region.nodes)
        layouts = {node: layout for node, layout in emitter.layouts.items() if node not in others}
        nodes = [node for node in region.nodes if dtype_of(node)]
        emitter.merged = set() if moved else merged_axes(region.shape[:-1], region.shape, nodes, layouts)
        space.split(emitter.merged)
        return emitter

    @property
    def refusal(self) -> str | None:
        """Why the nodes do not go together, if so. Raises LoweringError for a value that cannot be had where it is needed."""
        region, products = self.region, self.products
        reasons = [*map(refuses, products), *(_not_beside(node) for node in region.nodes if node not in products), self._unlike]
        reason = next((found for found in reasons if found is not None), None)
        if reason is not None:
            return reason
        if not region.writes:
            return "nobody uses its values"
        if len(region.reads) > MOST_READS or len(region.nodes) > MOST_NODES:
            return f"it has {len(region.nodes)} nodes and {len(region.reads)} operands; the template takes {MOST_NODES} and {MOST_READS}"
        odd = next((node for node in region.reads if dtype_of(node) not in TRITON_TYPES), None)
        if odd is not None:
            return f"{odd.name} is {odd.meta.get('val')}; the templates read tensors of real numbers"
        for node, given in products.items():
            inside = next((operand for operand in (given.weight, given.scale) if operand in region.nodes), None)
            if inside is not None:
                return f"{inside.name} is computed beside {node.name}, which reads it whole"
        other = next((node for node in region.writes if shape_of(node) != region.shape), None)
        if other is not None:
            return f"{other.name} is {list(shape_of(other))}; what goes along with {next(iter(products)).name} is {list(region.shape)}"
        if not self.sums:
            return f"nobody uses {next(iter(products)).name}"
        symbols_of(region)
        self.before(is_whole=False)
        return None if self.schedules else self._unscheduled

    @property
    def _unlike(self) -> str | None:
        """Why its products do not go along K together, if so."""
        (first, given), *others = self.products.items()
        for node, other in others:
            if other.x is not given.x:
                return f"{node.name} multiplies {other.x.name} and {first.name} {given.x.name}; a kernel goes along one of them"
            if (other.scale is None, other.groups, other.is_packed) != (given.scale is None, given.groups, given.is_packed):
                return f"{node.name} has {other.groups} scales a row and {first.name} {given.groups}, or none; a kernel goes along groups of one kind"
        return None

    @property
    def _unscheduled(self) -> str:
        """Why there are no block sizes for it."""
        plain = Fused(replace(self.region, template=PLAIN))
        if self.region.template == PLAIN or not plain.schedules:
            return f"a program would hold {self.held} values of each element at once"
        if self.rows is None or self.rows > FEW_ROWS:
            return f"it has {self.rows or 'any number of'} rows; K is divided where there are at most {FEW_ROWS}"
        return f"its programs fill a chip, or a part of the {self.given.inner} that they go along would be too short"


def _not_beside(node: Node) -> str | None:
    """Why a node cannot be computed beside a product, if so."""
    if template_name(node) is not None:
        return f"{node.name} is a kernel of its own"
    if row_text(node) is not None:
        return f"{node.name} takes whole rows; a program has a part of them"
    return not_expressible(node) if dtype_of(node) else None
