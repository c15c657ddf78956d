"""Axis rules of ops that look at places: gathers, scans, and windows on spatial axes."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dim, Dims
from paretorch.ir.analyze.walk import Walk, place
from paretorch.ir.graph import arguments
from paretorch.ir.ops import op_of
from paretorch.ir.types import TensorType, TupleType


def embedding(walk: Walk, node: Node) -> Dims:
    """weight[V, C] at indices[...]."""
    weight, indices = node.args[0], node.args[1]
    if not walk.constant[weight]:  # type: ignore[index]
        walk.event(node, "selects", walk.dims(weight)[:1], f"{place(node)} looks rows up by place")  # type: ignore[arg-type]
    return [*walk.dims(indices), walk.one(node, walk.shape(node)[-1])]  # type: ignore[arg-type]


def gather(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims, chosen = walk.dims(given["self"]), walk.dims(given["index"])
    if not dims:
        return chosen
    _looked_up(walk, node, dims[given["dim"]])
    axis = given["dim"] % len(dims)
    shape, whole = walk.shape(node), walk.shape(given["self"])
    return [
        walk.atoms.meet(dim, pick) if i != axis and shape[i] == whole[i] else pick
        for i, (dim, pick) in enumerate(zip(dims, chosen, strict=True))
    ]


def _looked_up(walk: Walk, node: Node, dim: Dim) -> None:
    walk.event(node, "selects", [dim], f"{place(node)} looks entries of the axis up by their places")


def index_select(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims = walk.dims(given["self"])
    _looked_up(walk, node, dims[given["dim"]])
    dims[given["dim"]] = walk.dims(given["index"])[0]
    return dims


def index(walk: Walk, node: Node) -> Dims | None:
    """x[i, :, j] and its like, and writes at places, which keep the axes of what is written to."""
    if op_of(node).name != "index":  # type: ignore[union-attr]
        return _write(walk, node)
    given = arguments(node)
    dims, chosen = walk.dims(given["self"]), list(given["indices"])
    chosen += [None] * (len(dims) - len(chosen))
    picked = [i for i, pick in enumerate(chosen) if pick is not None]
    if any(str(walk.type(chosen[i])).startswith(("bool", "u8")) for i in picked):
        return None
    for i in picked:
        _looked_up(walk, node, dims[i])
    met = walk.broadcast([walk.dims(chosen[i]) for i in picked])
    kept = [dim for i, dim in enumerate(dims) if i not in picked]
    together = picked == list(range(picked[0], picked[-1] + 1))
    start = picked[0] if together else 0
    return [*kept[:start], *met, *kept[start:]]


def _write(walk: Walk, node: Node) -> Dims:
    given = arguments(node)
    dims = walk.dims(given["self"])
    written = [dims[given["dim"]]] if "dim" in given and dims else dims
    walk.event(node, "positions", written, f"{place(node)} writes at places along the axis")
    return dims


def scan(walk: Walk, node: Node) -> Any:
    """Cumulative sums, sorts, rolls, flips, triangles: every entry depends on its place or on its neighbours."""
    given, found = arguments(node), walk.type(node)
    dims = walk.dims(given["self"])
    axes = given.get("dims", given.get("dim"))
    if axes is None:
        axes = (-2, -1) if op_of(node).name == "tril" else (-1,)  # type: ignore[union-attr]
    chosen = [axis % len(dims) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])] if dims else []
    if not chosen:
        chosen = list(range(len(dims)))
    walk.event(node, "positions", [dims[axis] for axis in chosen], f"{place(node)} depends on the order of the axis")
    first = found.items[0] if isinstance(found, TupleType) else found
    made = list(dims)
    if op_of(node).name in ("topk", "sort", "argsort"):  # type: ignore[union-attr]
        for axis in chosen:
            made[axis] = walk.one(node, first.shape[axis], () if op_of(node).name == "topk" else dims[axis])  # type: ignore[union-attr]
    return [list(made) for _ in found.items] if isinstance(found, TupleType) else made


def spatial(walk: Walk, node: Node) -> Any:
    """Convolutions, pooling, resizing, norms per channel. Channels are dimension 1, or 0 if there is no batch."""
    name = op_of(node).name  # type: ignore[union-attr]
    if name in ("batch_norm", "group_norm"):
        return _channel_norm(walk, node, name)
    x: Node = node.args[0]  # type: ignore[assignment]
    dims, before, after = walk.dims(x), walk.shape(x), walk.shape(node)
    weight = node.args[1] if name in ("convolution", "conv_transpose") else None
    rank = len(walk.shape(weight)) - 2 if isinstance(weight, Node) else _window_rank(node, len(dims))
    channel = len(dims) - rank - 1
    taps = walk.shape(weight)[2:] if isinstance(weight, Node) else None
    made = dims[:channel]
    if weight is None:
        made.append(dims[channel])
    else:
        reason = f"{place(node)} multiplies along the axis with weights of shape {list(walk.shape(weight))}"  # type: ignore[arg-type]
        walk.event(node, "bakes_length", [dims[channel]], reason)
        made.append(walk.one(node, after[channel]))
    for axis in range(channel + 1, len(dims)):
        single = taps is not None and taps[axis - channel - 1] == 1 and before[axis] == after[axis]
        if not single:
            walk.event(node, "bakes_length", [dims[axis]], f"{place(node)} runs a window over the axis of {before[axis]}")
        made.append(dims[axis] if single else walk.one(node, after[axis], dims[axis]))
    return made


def _window_rank(node: Node, rank: int) -> int:
    """The number of spatial axes of pooling and resizing, by the op's name."""
    name = str(node.target)
    return next((count for count in (1, 2, 3) if f"{count}d" in name), rank - 2)


def _channel_norm(walk: Walk, node: Node, name: str) -> Any:
    dims, found = walk.dims(node.args[0]), walk.type(node)  # type: ignore[arg-type]
    if name == "group_norm":
        walk.event(node, "pools", dims[1:], f"{place(node)} takes its statistics over the axis")
    elif len(dims) > 1:
        walk.event(node, "positions", [dims[1]], f"{place(node)} has weights for each entry of the axis")
    if isinstance(found, TupleType):
        rest = [walk.fresh(node, item.shape) for item in found.items[1:] if isinstance(item, TensorType)]
        return [dims, *rest]
    return dims
