"""Axes through views: what a dimension of one value is in the value it was viewed, transposed, expanded or repeated from.

A dimension is a tuple of axes, outermost first. Walking a chain of views in either direction splits axes where a view cuts them, and the
split holds everywhere, so that f32[B*H, T, D] and the f32[B, T, H, D] behind it agree on what B and H are. Axes are told apart by how they
came about, never by their length. An axis that is missing from a value is one that the value was broadcast or repeated along: this is how
repeated key heads become grouped heads and expanded masks become small again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import quotient
from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.ir.types import Size, TensorType


class Axis:
    """One axis; parts are its outer and inner factor once it has been split."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Axis, Axis] | None = None

    def split(self, outer: Size, inner: Size) -> tuple[Axis, Axis]:
        self.parts = (Axis(outer), Axis(inner))
        return self.parts


Dim = tuple[Axis, ...]
Dims = list[Dim]


def leaves(dim: Sequence[Axis]) -> Dim:
    """The dimension in axes that are not split any further."""
    found: list[Axis] = []
    for axis in dim:
        found += leaves(axis.parts) if axis.parts else (axis,)
    return tuple(found)


def flat(dims: Sequence[Dim]) -> Dim:
    """All axes of a value in their order in memory."""
    return tuple(axis for dim in dims for axis in leaves(dim))


def present(dims: Sequence[Dim]) -> set[Axis]:
    return set(flat(dims))


def length(dim: Sequence[Axis]) -> Size:
    """The product of the sizes."""
    total: Size = 1
    for axis in dim:
        total = total * axis.size
    return total


def fresh(node: Node) -> Dims:
    """New axes for the dimensions of a value, one each."""
    return [(Axis(size),) for size in shape_of(node)]


def regroup(axes: Sequence[Axis], sizes: Sequence[Size]) -> Dims | None:
    """The same elements in order cut into dimensions of these sizes; None if the cuts do not line up with the axes."""
    stream = list(reversed(leaves(axes)))
    made: Dims = []
    for size in sizes:
        taken = _take(stream, size)
        if taken is None:
            return None
        made.append(taken)
    if any(axis.size != 1 for axis in stream):
        return None
    if stream and made:
        made[-1] = (*made[-1], *reversed(stream))
    return made


def _take(stream: list[Axis], size: Size) -> Dim | None:
    """The next axes whose product is this size, splitting the last of them where needed."""
    if size == 1:
        return (stream.pop(),) if stream and stream[-1].size == 1 else ()
    taken: list[Axis] = []
    wanted = size
    while wanted != 1:
        if not stream:
            return None
        axis = stream.pop()
        rest = quotient(wanted, axis.size)
        if rest is not None:
            taken.append(axis)
            wanted = rest
            continue
        inner = quotient(axis.size, wanted)
        if inner is None:
            return None
        first, second = axis.split(wanted, inner)
        taken.append(first)
        stream.append(second)
        wanted = 1
    return tuple(taken)


def spelled(node: Any) -> str:
    """The name of the ATen op that a node calls without its overload: "transpose"; "" for anything that is not one."""
    schema = getattr(node.target, "_schema", None) if isinstance(node, Node) and node.op == "call_function" else None
    return schema.name.split("::")[-1] if schema is not None else ""


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and hasattr(node.meta.get("val"), "dtype") and hasattr(node.meta["val"], "shape")


def same_elements(node: Node) -> Node | None:
    """The operand, if this op returns it element by element as it is (in the same or another order of storage)."""
    name, given = spelled(node), node.args
    if name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh"):
        return given[0]  # type: ignore[return-value]
    if name in ("dropout", "native_dropout", "feature_dropout", "alpha_dropout"):
        found = arguments(node)
        return given[0] if found.get("p") == 0 or found.get("train") is False else None  # type: ignore[return-value]
    if name in ("_to_copy", "to", "type_as") and is_tensor(given[0]):
        source: Node = given[0]  # type: ignore[assignment]
        return source if tensor_type(source).dtype == tensor_type(node).dtype else None
    if name in ("add", "sub") and given[1] == 0 and is_tensor(given[0]):
        return given[0] if tensor_type(given[0]).dtype == tensor_type(node).dtype else None  # type: ignore[arg-type,return-value]
    if name in ("mul", "div") and given[1] == 1 and "rounding_mode" not in node.kwargs and is_tensor(given[0]):
        return given[0] if tensor_type(given[0]).dtype == tensor_type(node).dtype else None  # type: ignore[arg-type,return-value]
    if name == "slice" and is_tensor(given[0]) and shape_of(given[0]) == shape_of(node):  # type: ignore[arg-type]
        return given[0]  # type: ignore[return-value]
    return None


_VIEWS = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")


def permutation(node: Node) -> list[int] | None:
    """The order of dimensions that this op permutes to; None if it does not permute."""
    name = spelled(node)
    if name not in ("permute", "transpose", "t", "swapaxes", "swapdims", "mT", "adjoint", "movedim", "numpy_T"):
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    if name == "permute":
        wanted: Any = node.args[1]
        return [int(place) % rank for place in wanted]
    if name in ("t", "mT", "adjoint", "numpy_T"):
        return order[::-1] if name in ("t", "numpy_T") else [*order[:-2], rank - 1, rank - 2]
    first, second = node.args[1], node.args[2]
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    if name == "movedim":
        moved = order.pop(first % rank)
        order.insert(second % rank, moved)
        return order
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order


def step_back(node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """The operand of a view-like op and its dimensions, given the dimensions of the result; None if the op computes something."""
    source = same_elements(node)
    if source is not None:
        return source, dims
    name = spelled(node)
    operand: Any = node.args[0] if node.args else None
    if not is_tensor(operand):
        return None
    if name in _VIEWS:
        found = regroup(flat(dims), shape_of(operand))
        return (operand, found) if found is not None else None
    order = permutation(node)
    if order is not None:
        back: Dims = [()] * len(order)
        for place, origin in enumerate(order):
            back[origin] = dims[place]
        return operand, back
    handler = _REPEATS.get(name)
    found = handler(node, operand, dims) if handler else None
    return (operand, found) if found is not None else None


def _expand_back(node: Node, operand: Node, dims: Dims) -> Dims | None:
    return aligned(dims, shape_of(operand), shape_of(node))


def aligned(dims: Sequence[Dim], operand: Sequence[Size], result: Sequence[Size]) -> Dims:
    """The dimensions of an operand that is broadcast, from the right, to a result with these dimensions."""
    skipped = len(result) - len(operand)
    pairs = zip(operand, result[skipped:], dims[skipped:], strict=True)
    return [() if size == 1 and full != 1 else dim for size, full, dim in pairs]


def _repeat_interleave_back(node: Node, operand: Node, dims: Dims) -> Dims | None:
    given = arguments(node)
    place, repeats = given.get("dim"), given.get("repeats")
    if not isinstance(place, int) or not isinstance(repeats, int):
        return None
    return _without_repeats(dims, place % len(dims), [shape_of(operand)[place], repeats], 0)


def _repeat_back(node: Node, operand: Node, dims: Dims) -> Dims | None:
    times: Any = node.args[1]
    sizes = shape_of(operand)
    skipped = len(times) - len(sizes)
    found: Dims | None = list(dims[skipped:])
    for place, repeats in enumerate(times[skipped:]):
        if repeats == 1 or found is None:
            continue
        if sizes[place] == 1:
            found[place] = ()
        elif isinstance(repeats, int):
            found = _without_repeats(found, place, [repeats, sizes[place]], 1)
        else:
            return None
    return found


def _without_repeats(dims: Dims, place: int, sizes: list[Size], kept: int) -> Dims | None:
    """Cut one dimension into repeats and the rest, and keep the rest."""
    pair = regroup(dims[place], sizes)
    return [*dims[:place], pair[kept], *dims[place + 1 :]] if pair is not None else None


_REPEATS: dict[str, Callable[[Node, Node, Dims], Dims | None]] = {
    "expand": _expand_back,
    "expand_as": _expand_back,
    "repeat_interleave": _repeat_interleave_back,
    "repeat": _repeat_back,
}


def step_forward(node: Node, dims: Dims) -> Dims | None:
    """The dimensions of the result of a view-like op on a value with these dimensions; None if the op computes something."""
    if same_elements(node) is not None:
        return dims
    name = spelled(node)
    if name in _VIEWS:
        return regroup(flat(dims), shape_of(node))
    order = permutation(node)
    if order is not None:
        return [dims[place] for place in order]
    if name == "expand":
        operand: Any = node.args[0]
        sizes, wider = shape_of(operand), shape_of(node)
        unchanged = all(size == full for size, full in zip(sizes, wider[len(wider) - len(sizes) :], strict=True))
        return [*((Axis(size),) for size in wider[: len(wider) - len(sizes)]), *dims] if unchanged else None
    return None


@dataclass
class Operand:
    """A value seen through its views: the node that they start from and that node's dimensions.

    factor: the numbers that the value was multiplied by on the way; passed: the nodes that were walked through.
    """

    node: Node
    dims: Dims
    factor: float = 1.0
    passed: list[Node] = field(default_factory=list)

    @property
    def axes(self) -> set[Axis]:
        return present(self.dims)

    @property
    def type(self) -> TensorType:
        return tensor_type(self.node)


def trace(node: Node, dims: Dims, scalar: Callable[[Any], float | None] | None = None) -> Operand:
    """Walk back through views, and through products with numbers if `scalar` can tell what a number is."""
    operand = Operand(node, dims)
    while True:
        found = step_back(operand.node, operand.dims)
        if found is None and scalar is not None:
            scaled = scaled_operand(operand.node, scalar)
            if scaled is not None:
                operand.factor *= scaled[1]
                found = scaled[0], operand.dims
        if found is None:
            return operand
        operand.passed.append(operand.node)
        operand.node, operand.dims = found


def scaled_operand(node: Node, scalar: Callable[[Any], float | None]) -> tuple[Node, float] | None:
    """x and c where this node is x * c, c * x, x / c or -x with one number c, in the type of x."""
    name = spelled(node)
    if name == "neg":
        return node.args[0], -1.0  # type: ignore[return-value]
    if name not in ("mul", "div") or len(node.args) != 2 or node.kwargs.get("rounding_mode") is not None:
        return None
    pairs = [(node.args[0], node.args[1])]
    if name == "mul":
        pairs.append((node.args[1], node.args[0]))
    for x, number in pairs:
        if not is_tensor(x) or tensor_type(x) != tensor_type(node):  # type: ignore[arg-type]
            continue
        value = scalar(number)
        if value is not None and (name == "mul" or value != 0.0):
            return x, value if name == "mul" else 1.0 / value  # type: ignore[return-value]
    return None


def behind_channels(operand: Operand, width: set[Axis]) -> set[Axis]:
    """Axes that share a dimension with the head width somewhere behind this operand: the sign of heads cut from channels."""
    found: set[Axis] = set()
    node, dims = operand.node, [leaves(dim) for dim in operand.dims]
    while True:
        for dim in dims:
            if set(dim) & width:
                found |= set(dim) - width
        behind = step_back(node, dims) or _through_selection(node, dims)
        if behind is None:
            return {axis for axis in found if axis.size != 1}
        node, dims = behind[0], [leaves(dim) for dim in behind[1]]


def _through_selection(node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """Back through the choice of one of several packed projections."""
    name, source = spelled(node), node.args[0] if node.args else None
    if name == "" and isinstance(source, Node) and spelled(source) == "unbind":
        given = arguments(source)
        place, whole = given["dim"], given["self"]
    elif name == "select" and is_tensor(source):
        place, whole = arguments(node)["dim"], source
    else:
        return None
    sizes = shape_of(whole)
    place = place % len(sizes)
    return whole, [*dims[:place], (Axis(sizes[place]),), *dims[place:]]
