"""Where tokens stand: the grid that a token axis was made from, if its making says so."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Node

from paretorch.ir.analyze import AxisFacts, TokenAxis
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op, op_of

STEPS = 64  # back from the first value that has the axis to the view that made it


@dataclass(frozen=True)
class Grid:
    """first: tokens before those of the grid; then rows * columns tokens, row by row."""

    first: int
    rows: int
    columns: int


def grid_of(graph: Graph, axes: AxisFacts, axis: TokenAxis) -> Grid | None:
    """The grid of an axis that a view joined from two, with or without tokens in front of it; None if nothing tells of one."""
    born = graph.node(axis.atom.born)
    first = 0
    if born is not None and is_op(born, "cat"):
        given = arguments(born)
        parts, dim = list(given["tensors"]), given.get("dim", 0)
        if not all(isinstance(shape_of(part)[dim], int) for part in parts):
            return None
        first, born = sum(shape_of(part)[dim] for part in parts[:-1]), parts[-1]
    sides = _joined(axes, born, axis.atom.size - first)
    return Grid(first, *sides) if sides else None


def _joined(axes: AxisFacts, node: Node | None, tokens: int) -> tuple[int, int] | None:
    """Back through what keeps places, to the view that joined two dimensions into one of this length."""
    for _ in range(STEPS):
        if node is None or node.op != "call_function":
            return None
        computed = [argument for argument in node.all_input_nodes if argument.op != "get_attr"]
        if is_op(node, "view") and len(computed) == 1:
            before, after = shape_of(computed[0]), shape_of(node)
            pairs = [(i, pair) for i, pair in enumerate(pairwise(before)) if pair[0] * pair[1] == tokens]
            for place, (rows, columns) in pairs:
                if after == (*before[:place], tokens, *before[place + 2 :]) and rows > 1 and columns > 1:
                    return int(rows), int(columns)
        op = op_of(node)
        if op is None or op.axes not in ("pointwise", "permute", "transpose", "view", "last_axis", "linear") or not computed:
            return None
        node = max(computed, key=lambda argument: sum(size == tokens for size in shape_of(argument)))
    return None
