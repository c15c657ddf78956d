"""Templates of whole ops: one node becomes one file of device functions, where the templates of chains and rows take any nodes that go together.

region_of_op(node)   -> the region of this node and of the parts of its result
A template says what it takes, how much work its kernel does, where it goes before torch's own kernel, and fills its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from paretorch.codegen.expressions import dtype_of
from paretorch.codegen.kernel import Part, Region, Schedule
from paretorch.codegen.kernel_file import wrapped
from paretorch.codegen.layouts import layout_of
from paretorch.ir.graph import shape_of
from paretorch.ir.ops import OpTemplate, is_op, op_of


@dataclass(frozen=True)
class Effort:
    """What a kernel does, as ints or sympy expressions. is_rated_alike: whether the price curve of the node's own op fits; otherwise it streams.
    rate: the share that it reaches of the rate of torch's kernel for the op; light_flops: of what is computed beside it, at the rate of light ops.
    programs: that share the work, None where there are always enough; of_a_unit: how many of them keep one of a chip's units busy."""

    flops: Any
    bytes_moved: Any
    launches: int = 1
    is_rated_alike: bool = True
    rate: float = 1.0
    light_flops: Any = 0
    programs: Any = None
    of_a_unit: int = 1


@dataclass(frozen=True)
class Built:
    """What a template makes of a region.

    text: the device functions; parameters: (name, Triton type) of the first one; parts: of the others; names: of reads and writes in the
    launcher; launches: its lines; reference: the lines of the same in torch.
    """

    text: str
    parameters: tuple[tuple[str, str], ...]
    schedule: Schedule
    names: dict[Node, str]
    launches: tuple[str, ...]
    reference: tuple[str, ...]
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class WholeOp:
    """refuses: (node) -> None or a sentence; goes_first: (node) -> whether torch has no kernel for just this, so that ours runs where it costs no more;
    effort: (region) -> Effort; schedules: (region) -> what may be tried, the default first; build: (region, name of the kernel, schedule or None) ->
    Built; joins: (region of the op and others) -> None or why they are not one kernel, itself None where the op is always alone."""

    name: str
    refuses: Callable[[Node], str | None]
    goes_first: Callable[[Node], bool]
    effort: Callable[[Region], Effort]
    schedules: Callable[[Region], tuple[Schedule, ...]]
    build: Callable[[Region, str, Schedule | None], Built]
    joins: Callable[[Region], str | None] | None = None


def template_name(node: Node) -> str | None:
    """The template of whole ops that the op table names for this node."""
    op = op_of(node)
    return op.triton.name if op is not None and isinstance(op.triton, OpTemplate) else None


def own_node(region: Region) -> Node:
    """The node that gives a region of a whole op its template."""
    return next(node for node in region.nodes if template_name(node) is not None)


def region_of_op(node: Node) -> Region:
    """This node as a region: what it reads, each once, and its result or those parts of it that are used."""
    parts = tuple(user for user in node.users if is_op(user, "getitem"))
    writes = (node,) if dtype_of(node) else tuple(sorted(parts))
    nodes = (node,) if dtype_of(node) else (node, *writes)
    reads = dict.fromkeys(operand for operand in node.all_input_nodes if dtype_of(operand))
    return Region(template_name(node) or "", nodes, tuple(reads), writes, shape_of(writes[0]) if writes else ())


def stride_kinds(node: Node, name: str, axes: Sequence[int]) -> list[tuple[str, str]]:
    """(parameter, type) of the strides of these axes. They have as many bits as their numbers need, which triton finds at each launch; the kernel
    multiplies in 64."""
    known = layout_of(node, name).known
    return [(f"{name}_s{axis}", stride_kind(known[axis])) for axis in axes]


def stride_kind(stride: Any) -> str:
    """ ":16" where the stride at hand is a multiple of 16, which triton also looks at."""
    return "i32:16" if isinstance(stride, int) and stride % 16 == 0 and stride > 0 else "i32"


def signature_text(parameters: Sequence[tuple[str, str]], constants: Sequence[str]) -> str:
    """The parameters of a device function, as its own lines."""
    return wrapped(", ".join([*(name for name, _ in parameters), *(f"{name}: tl.constexpr" for name in constants)]))
