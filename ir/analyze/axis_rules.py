"""One function for each entry of the op table's `axes` column: how the dimensions of a value pass through that kind of op.

A rule returns the dims of the output (for several outputs a list of them), or None where it cannot say, which makes the node opaque.
What is not pointwise along an axis is told as an event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dims
from paretorch.ir.analyze.axis_rules_mixing import addmm, attention, linear, matmul, softmax
from paretorch.ir.analyze.axis_rules_places import embedding, gather, index, index_select, scan, spatial
from paretorch.ir.analyze.axis_rules_tokens import TOKEN_RULES
from paretorch.ir.analyze.view_axes import view_dims
from paretorch.ir.analyze.walk import Walk, nodes_in, place
from paretorch.ir.graph import arguments
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.types import TupleType

Rule = Callable[[Walk, Node], Any]


def pointwise(walk: Walk, node: Node) -> Dims:
    operands = [argument for argument in nodes_in(list(node.args) + list(node.kwargs.values())) if walk.is_tensor(argument)]
    met = walk.broadcast([walk.dims(operand) for operand in operands])
    if not walk.constant[node]:
        for operand in operands:
            if walk.constant[operand]:
                shape = walk.shape(operand)
                own = [met[len(met) - len(shape) + i] for i, size in enumerate(shape) if size != 1]
                walk.event(
                    node, "positions", own, f"{place(node)} combines the axis with a constant of shape {list(shape)}, entry by entry"
                )
    return met


def last_axis(walk: Walk, node: Node) -> Dims:
    """Norms over the last dimensions."""
    dims, count = walk.dims(node.args[0]), len(arguments(node)["normalized_shape"])  # type: ignore[arg-type]
    walk.event(node, "pools", dims[len(dims) - count :], f"{place(node)} takes its statistics over the axis")
    return dims


def reduce(walk: Walk, node: Node) -> Any:
    given = arguments(node)
    dims = walk.dims(given["self"])
    axes = given.get("dim")
    gone = (
        range(len(dims))
        if axes is None or axes == []
        else [axis % len(dims) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
    )
    found = walk.type(node)
    several = isinstance(found, TupleType) and getattr(found.items[1], "dtype", "") == "i64"  # max.dim and min.dim
    taken = any(user.args[1] == 1 and user.users for user in node.users) if several else True
    by_place = taken and (several or is_op(node, "argmax", "argmin"))
    walk.event(node, "pools", [dims[axis] for axis in gone], f"{place(node)} returns places along the axis" if by_place else "")
    kept: Dims = [() if axis in gone else dim for axis, dim in enumerate(dims) if axis not in gone or given.get("keepdim")]
    return [list(kept) for _ in found.items] if isinstance(found, TupleType) else kept


def view(walk: Walk, node: Node) -> Dims:
    return view_dims(walk.atoms, walk.dims(node.args[0]), walk.shape(node), node.name)  # type: ignore[arg-type]


def permute(walk: Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])  # type: ignore[arg-type]
    return [dims[axis] for axis in node.args[1]]  # type: ignore[union-attr, index]


def transpose(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims = walk.dims(given["self"])
    if len(dims) < 2:
        return dims
    first, second = given.get("dim0", 0), given.get("dim1", 1)
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def unsqueeze(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims = walk.dims(given["self"])
    dims.insert(given["dim"] % (len(dims) + 1), ())
    return dims


def squeeze(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims, axes = walk.dims(given["self"]), given.get("dim")
    chosen = range(len(dims)) if axes is None else [axis % len(dims) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
    return [dim for axis, dim in enumerate(dims) if axis not in chosen or dim != ()]


def expand(walk: Walk, node: Node) -> Dims:
    shape, dims = walk.shape(node), walk.dims(node.args[0])  # type: ignore[arg-type]
    dims = [()] * (len(shape) - len(dims)) + dims
    return [dim or walk.atoms.dim(size, node.name, weak=True) for dim, size in zip(dims, shape, strict=True)]


def repeat(walk: Walk, node: Node) -> Dims:
    shape, dims = walk.shape(node), walk.dims(node.args[0])  # type: ignore[arg-type]
    dims = [()] * (len(shape) - len(dims)) + dims
    if len(dims) != len(shape):
        return walk.fresh(node, shape)
    return [dim if walk.atoms.size(dim) == size else walk.one(node, size, dim) for dim, size in zip(dims, shape, strict=True)]


def select(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims = walk.dims(given["self"])
    walk.event(node, "selects", [dims[given["dim"]]])
    del dims[given["dim"]]
    return dims


def cut(walk: Walk, node: Node) -> Dims:
    """A slice: whole, it keeps the axis; from the front to a fixed place it has a length of its own; otherwise its length follows."""
    given = arguments(node)
    dims, shape, axis = walk.dims(given["self"]), walk.shape(node), given["dim"] % len(walk.shape(node))
    whole, size = walk.shape(given["self"])[axis], shape[axis]
    if size == whole:
        return dims
    start = given.get("start") or 0
    to_fixed_end = given["length"] + start if "length" in given else given.get("end")
    prefix = start == 0 and isinstance(to_fixed_end, int) and to_fixed_end >= 0
    suffix = isinstance(start, int) and (
        to_fixed_end is None or (isinstance(to_fixed_end, int) and to_fixed_end >= 2**31) or to_fixed_end == whole
    )
    plain = (prefix or suffix) and given.get("step", 1) == 1
    walk.event(
        node, "selects", [dims[axis]], "" if plain else f"{place(node)} cuts {start}:{to_fixed_end} out of the axis of {whole}, by place"
    )
    dims[axis] = walk.one(node, size, () if prefix else dims[axis])
    return dims


def split(walk: Walk, node: Node) -> Any:
    given = arguments(node)
    dims, axis = walk.dims(given["self"]), given.get("dim", 0)
    axis %= len(dims)
    sizes = [item.shape[axis] for item in walk.type(node).items]
    if len(sizes) == 1:
        return [dims]
    keeps_prefix = all(isinstance(size, int) for size in sizes[:-1]) and all(_not_smaller(sizes[-1], size) for size in sizes[:-1])
    even = all(size == sizes[0] for size in sizes)
    reason = "" if keeps_prefix and not even else f"{place(node)} splits the axis into {sizes}"
    walk.event(node, "selects" if not reason else "bakes_length", [dims[axis]], reason)
    parts = []
    for number, size in enumerate(sizes):
        follows = bool(reason) or number == len(sizes) - 1
        parts.append([*dims[:axis], walk.one(node, size, dims[axis] if follows else ()), *dims[axis + 1 :]])
    return parts


def _not_smaller(size: Any, other: Any) -> bool:
    return not isinstance(size, int) or not isinstance(other, int) or size >= other


def unbind(walk: Walk, node: Node) -> Any:
    given = arguments(node)
    dims, axis = walk.dims(given["self"]), given.get("dim", 0)
    axis %= len(dims)
    walk.event(node, "bakes_length", [dims[axis]], f"{place(node)} takes the axis apart into {len(walk.type(node).items)} values")
    return [dims[:axis] + dims[axis + 1 :] for _ in walk.type(node).items]


def cat(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    rank = len(walk.shape(node))
    parts = [part for part in given["tensors"] if len(walk.shape(part)) == rank]
    axis = given.get("dim", 0) % rank
    met = walk.broadcast([[dim if i != axis else () for i, dim in enumerate(walk.dims(part))] for part in parts])
    along = [walk.dims(part)[axis] for part in parts]
    live = [dim for dim, part in zip(along, parts, strict=True) if walk.shape(part)[axis] != 0]
    rejoined = walk.atoms.resolve(live[0]) if len(live) == 1 else None
    walk.event(node, "appends", along)
    met[axis] = rejoined if rejoined is not None else walk.one(node, walk.shape(node)[axis], [atom for dim in along for atom in dim])
    return met


def stack(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    met = walk.broadcast([walk.dims(part) for part in given["tensors"]])
    axis = given.get("dim", 0) % (len(met) + 1)
    met.insert(axis, walk.one(node, walk.shape(node)[axis]))
    return met


def pad(walk: Walk, node: Node) -> Dims:
    dims, shape = walk.dims(node.args[0]), walk.shape(node)  # type: ignore[arg-type]
    before = walk.shape(node.args[0])  # type: ignore[arg-type]
    for axis, (size, old) in enumerate(zip(shape, before, strict=True)):
        if size != old:
            walk.event(node, "appends", [dims[axis]], f"{place(node)} pads the axis from {old} to {size}")
            dims[axis] = walk.one(node, size, dims[axis])
    return dims


def create(walk: Walk, node: Node) -> Dims:
    """full_like and its like have the axes of their input; what is made from sizes has new ones, of a constant."""
    like = str(node.target).split(".")[1].endswith("_like")
    if like:
        return walk.dims(node.args[0])  # type: ignore[arg-type]
    walk.constant[node] = True
    return walk.fresh(node, walk.shape(node))


def keep(walk: Walk, node: Node) -> Dims:
    return walk.dims(node.args[0])  # type: ignore[arg-type]


RULES: dict[str, Rule] = {
    "pointwise": pointwise, "last_axis": last_axis, "reduce": reduce, "view": view, "permute": permute, "transpose": transpose,
    "unsqueeze": unsqueeze, "squeeze": squeeze, "expand": expand, "repeat": repeat, "select": select, "slice": cut, "split": split,
    "unbind": unbind, "cat": cat, "stack": stack, "pad": pad, "create": create, "linear": linear, "matmul": matmul, "addmm": addmm,
    "attention": attention, "softmax": softmax, "embedding": embedding, "gather": gather, "index_select": index_select, "index": index,
    "scan": scan, "spatial": spatial, **TOKEN_RULES,
}  # fmt: skip


def rule_of(node: Node) -> Rule | None:
    """The axis rule of a node's op; None if it is opaque."""
    op = op_of(node)
    return RULES.get(op.axes or "") if op else None
