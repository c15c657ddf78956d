"""Frames: what tells that a token axis is several frames of as many places each, frame by frame.

Read off the view that made the axis: [B,F,P,C] -> [B,F*P,C], [B,F,H,W,C] -> [B,F*H*W,C] (and with channels first), or frames that went through
as samples of their own, [B*F,P,C] -> [B,F*P,C]. The rows and columns of one picture make tokens in the same way: two axes that one
convolution made, or two parts of axes that were cut in patches, are no frames and places.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, TokenAxis
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op, op_of

STEPS = 64  # back from the first value that has the axis to the view that made it


@dataclass(frozen=True)
class Frames:
    """first: tokens before those of the frames; then count * places tokens, frame by frame."""

    first: int
    count: int
    places: int


def frames_of(graph: Graph, axes: AxisFacts, axis: TokenAxis) -> Frames | None:
    """The frames of an axis that a view made of frames and places, with or without tokens in front; None if nothing tells of any."""
    born, first = graph.node(axis.atom.born), 0
    dim = axes.dim(axis.atom.born, axis.atom)
    if born is None or dim is None or not isinstance(axis.atom.size, int):
        return None
    if is_op(born, "cat"):
        given = arguments(born)
        *before, part = given["tensors"]
        sizes = [shape_of(other)[dim] for other in before]
        if given.get("dim", 0) % len(shape_of(born)) != dim or not all(isinstance(size, int) for size in sizes):
            return None
        first, born = int(sum(sizes)), part
    tokens = axis.atom.size - first
    for _ in range(STEPS):
        op, maps = op_of(born), axes.maps.get(born.name, ())
        if op is None or op.axes not in ("pointwise", "permute", "transpose", "view", "last_axis", "linear", "cat") or dim >= len(maps):
            return None
        if is_op(born, "view"):
            count = _joined(graph, axes, born, dim, tokens)
            if count is not None:
                return Frames(first, count, tokens // count) if 1 < count < tokens else None
        sources = [source for source in born.all_input_nodes if maps[dim] in axes.maps.get(source.name, ()) and maps[dim]]
        if len(sources) != 1 or is_op(born, "cat"):
            return None
        dim, born = axes.maps[sources[0].name].index(maps[dim]), sources[0]
    return None


def _joined(graph: Graph, axes: AxisFacts, view: Node, dim: int, tokens: int) -> int | None:
    """How many frames a view joins with their places in this dimension: 0 if what it joins are no frames, None if it joins nothing there."""
    x: Node = view.args[0]  # type: ignore[assignment]
    before, behind = shape_of(x), prod(shape_of(view)[dim + 1 :])
    end = len(before)
    while end and prod(before[end:]) != behind:
        end -= 1
    start = end
    while start and isinstance(before[start - 1], int) and tokens % prod(before[start - 1 : end]) == 0:
        start -= 1
    joined = before[start:end]
    while joined and joined[0] == 1:
        joined = joined[1:]
    if prod(joined) == tokens:
        if len(joined) == 1:
            return None
        alone = [atoms[0] for atoms in axes.maps.get(x.name, ())[end - 2 : end] if len(atoms) == 1]
        picture = len(joined) == 2 and (len(alone) < 2 or _is_picture(graph, axes, alone))  # or blended of several axes, such as windows
        return 0 if picture else int(joined[0])
    batch = axes.maps[x.name][start - 1] if joined and start and x.name in axes.maps else ()
    if not batch or _is_picture(graph, axes, [batch[-1], *(atom for atoms in axes.maps[x.name][start:end] for atom in atoms)]):
        return 0
    return int(tokens // prod(joined))  # the rest comes out of the batch


def _is_picture(graph: Graph, axes: AxisFacts, sides: list[Atom]) -> bool:
    """Whether axes are rows and columns: the first two made by one convolution, or all of them cut out of longer axes."""
    born = graph.node(sides[0].born)
    op = op_of(born) if born is not None else None
    windowed = sides[0].born == sides[1].born and op is not None and op.axes == "spatial"
    return windowed or all(axes.dim(side.born, side) is None for side in sides)
