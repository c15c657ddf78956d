"""Products with a weight matrix as one kernel, with what is computed elementwise before and after: what the template takes, its work, its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Node

from paretorch.codegen.coordinates import is_plain, product, source_of
from paretorch.codegen.emission import Emitter, Space
from paretorch.codegen.expressions import TRITON_TYPES, dtype_of, not_expressible, row_text, unique_names
from paretorch.codegen.kernel import Region, Schedule
from paretorch.codegen.layouts import merged_axes
from paretorch.codegen.schedules import product_schedules
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.whole_op import template_name
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import OpTemplate, is_op, op_of
from paretorch.ir.types import DTYPES

HELD = ("f32", "f16", "bf16")
MOST_READS = 16  # operands of one kernel
MOST_NODES = 32
LOCALS = (  # what the template's own text calls its values
    "program", "row_blocks", "column_blocks", "first", "high", "total", "step", "along", "within", "left", "right", "part",
    "rows", "programs", "schedule", "few", "wide",
)  # fmt: skip
ROWS, COLUMNS = (r"\b(row|at_\d+)\b", "in_rows"), (r"\bcolumn\b", "in_columns")
INNER = (r"\binner\b", "in_inner")


@dataclass(frozen=True)
class Operands:
    """What a product multiplies. weight: [N, K], or [K, N] if it is turned; scale: of groups of K; None where there is none."""

    x: Node
    weight: Node
    scale: Node | None
    bias: Node | None
    is_turned: bool

    @property
    def columns(self) -> Any:
        return shape_of(self.weight)[1 if self.is_turned else 0]

    @property
    def inner(self) -> Any:
        return shape_of(self.weight)[0 if self.is_turned else 1]

    @property
    def groups(self) -> int:
        return int(shape_of(self.scale)[1]) if self.scale is not None else 1


def operands_of(node: Node) -> Operands:
    """The arguments of a product, by the roles that its row of the op table gives them."""
    op, given = op_of(node), arguments(node)
    assert op is not None  # a node of a row of the table
    assert isinstance(op.triton, OpTemplate)
    found = {role: given[name] for role, name in op.triton.roles if given.get(name) is not None}
    turned = "turned_weight" in found
    return Operands(found["x"], found["turned_weight" if turned else "weight"], found.get("scale"), found.get("bias"), turned)


def refuses(node: Node) -> str | None:
    """None, or why the template does not take this product by itself."""
    given = operands_of(node)
    x, weight, dtype = shape_of(given.x), shape_of(given.weight), dtype_of(given.x)
    if dtype not in HELD or dtype_of(node) != dtype or dtype_of(given.weight) != ("i8" if given.scale is not None else dtype):
        return (
            f"{node.name} is of {dtype} and {dtype_of(given.weight)}; the template takes one of {', '.join(HELD)}, or such with scaled i8"
        )
    if len(weight) != 2 or not x or not all(isinstance(size, int) and size > 0 for size in weight):
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
    return None


def joins(region: Region) -> str | None:
    """None, or why this product and the nodes beside it are not one kernel."""
    try:
        return Fused(region).refusal
    except LoweringError as error:
        return str(error)


@dataclass(frozen=True)
class Fused:
    """A region of one product and elementwise nodes before and after it, and the lines that compute these. Raises LoweringError."""

    region: Region

    @cached_property
    def node(self) -> Node:
        return next(node for node in self.region.nodes if template_name(node) == self.region.template)

    @cached_property
    def given(self) -> Operands:
        return operands_of(self.node)

    @cached_property
    def names(self) -> dict[Node, str]:
        """Of all values: those that are multiplied by their roles, others by their own names."""
        roles: dict[Node, str] = {}
        for role in ("x", "weight", "scale", "bias"):
            operand = getattr(self.given, role)
            if operand is not None and operand in self.region.reads:
                roles.setdefault(operand, role)
        return unique_names([*self.region.reads, *self.region.nodes], roles, LOCALS)

    @property
    def rows(self) -> int | None:
        """How many there are, None if it varies."""
        found = product(self.region.shape[:-1])
        return found if isinstance(found, int) else None

    def before(self, *, is_whole: bool) -> Emitter:
        """The lines that make a block of x, as it is multiplied. is_whole: whether blocks divide K, so that no place along it is outside."""
        masks = (ROWS,) if is_whole else (ROWS, INNER)
        emitter = self._emitter(Space(shape_of(self.given.x), True, "row", column="inner", masks=masks))
        emitter.value(self.given.x, emitter.space.at)
        return emitter

    @cached_property
    def after(self) -> Emitter:
        """The lines that make what is written of the product's block, which is called `total`."""
        emitter = self._emitter(Space(self.region.shape, True, "row", masks=(ROWS, COLUMNS)))
        text = "total"
        if self.given.bias is not None:
            text = f"total + {emitter.value(self.given.bias, emitter.space.at[-1:])}"
        emitter.give(self.node, text)
        for node in self.region.writes:
            emitter.write(node)
        return emitter

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The block sizes that fit, the best first."""
        return self.schedules_for(self.rows)

    def schedules_for(self, rows: int | None) -> tuple[Schedule, ...]:
        """Those for so many rows, None if they vary."""
        given = self.given
        itemsize, length = DTYPES[dtype_of(given.x)].itemsize, given.inner // given.groups
        return product_schedules(itemsize, rows, given.columns, length, self.held, is_scaled=given.groups > 1)

    @property
    def held(self) -> int:
        """How many values of an element are held at once."""
        return max(self.after.held(self.region.writes), 2)

    def _emitter(self, space: Space) -> Emitter:
        """Both spaces go along the same rows, so that axes which one passes over together are so in the other."""
        region, others = self.region, {self.given.weight, self.given.scale}
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
        region, beside = self.region, [node for node in self.region.nodes if node is not self.node]
        reason = refuses(self.node) or next((found for node in beside if (found := _not_beside(node)) is not None), None)
        if reason is not None:
            return reason
        if not region.writes:
            return "nobody uses its values"
        if len(region.reads) > MOST_READS or len(region.nodes) > MOST_NODES:
            return f"it has {len(region.nodes)} nodes and {len(region.reads)} operands; the template takes {MOST_NODES} and {MOST_READS}"
        odd = next((node for node in region.reads if dtype_of(node) not in TRITON_TYPES), None)
        if odd is not None:
            return f"{odd.name} is {odd.meta.get('val')}; the templates read tensors of real numbers"
        inside = next((node for node in (self.given.weight, self.given.scale) if node in region.nodes), None)
        if inside is not None:
            return f"{inside.name} is computed beside {self.node.name}, which reads it whole"
        other = next((node for node in region.writes if shape_of(node) != region.shape), None)
        if other is not None:
            return f"{other.name} is {list(shape_of(other))}; what goes along with {self.node.name} is {list(region.shape)}"
        symbols_of(region)
        self.before(is_whole=False)
        return None if self.schedules else f"a program would hold {self.held} values of each element at once"


def _not_beside(node: Node) -> str | None:
    """Why a node cannot be computed beside a product, if so."""
    if template_name(node) is not None:
        return f"{node.name} is a kernel of its own"
    if row_text(node) is not None:
        return f"{node.name} takes whole rows; a program has a part of them"
    return not_expressible(node) if dtype_of(node) else None
