"""einsum and tensordot of a value and a constant, as `linear` between views.

    einsum("btc,chd->bthd", x, W)   ->   reshape(linear(x, W as [H*D, C]), [B, T, H, D])

The constant's axes are either summed over (then the value has them too) or new; a contraction of another kind, or of two values, stays here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import aten

Letters = list[Any]  # one name per axis


def contractions(graph: Graph) -> Graph:
    """The same function with `linear` for contractions with a constant."""
    graph = graph.copy()
    for node in graph.calls:
        if node.target is aten("einsum.default"):
            _try_both(graph, node, list(node.args[1]), einsum_letters(node))  # type: ignore[arg-type]
        elif node.target is aten("tensordot.default"):
            _try_both(graph, node, list(node.args[:2]), _tensordot_letters(node))
    return graph.clean()


def _try_both(graph: Graph, node: Node, operands: list[Any], letters: list[Letters] | None) -> None:
    """letters: of both operands and the result."""
    if letters is None or len(operands) != 2:
        return
    (left, right), (left_letters, right_letters, out) = operands, letters
    if graph.constant(right) is not None:
        _to_linear(graph, node, left, right, left_letters, right_letters, out)
    elif graph.constant(left) is not None:
        _to_linear(graph, node, right, left, right_letters, left_letters, out)


def einsum_letters(node: Node) -> list[Letters] | None:
    """The indices of both operands and the result; None if there are not two operands, or the result is left open."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms, arrow, result = equation.partition("->")
    parts = terms.split(",")
    if not arrow or len(parts) != 2 or len(operands) != 2:  # type: ignore[arg-type]
        return None
    ranks = [tensor_type(operand).rank for operand in operands]  # type: ignore[union-attr, arg-type]
    found = [_letters(part, rank) for part, rank in zip(parts, ranks, strict=True)]
    return [*found, _letters(result, tensor_type(node).rank)]


def _letters(term: str, rank: int) -> Letters:
    """One name per axis; the axes of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return [*before, *(("...", count - place) for place in range(count)), *after]


def _tensordot_letters(node: Node) -> list[Letters]:
    bound = arguments(node)
    left, right = ([(side, axis) for axis in range(tensor_type(bound[side]).rank)] for side in ("self", "other"))
    for mine, theirs in zip(bound["dims_self"], bound["dims_other"], strict=True):
        right[theirs] = left[mine]
    summed = {left[place] for place in bound["dims_self"]}
    return [left, right, [name for name in [*left, *right] if name not in summed]]


def _to_linear(graph: Graph, node: Node, x: Node, weight: Node, mine: Letters, theirs: Letters, out: Letters) -> None:
    summed = [name for name in mine if name in theirs and name not in out]
    kept, new = [name for name in mine if name not in summed], [name for name in theirs if name not in summed]
    distinct = all(len(set(names)) == len(names) for names in (mine, theirs, out))
    if not distinct or not summed or not new or set(kept) & set(new) or set(out) != {*kept, *new}:
        return
    if sum(not isinstance(size, int) for size in shape_of(x)) > 1 or x.meta["val"].dtype != weight.meta["val"].dtype:
        return
    held = graph.constants[str(weight.target)]
    sizes = dict(zip(theirs, held.shape, strict=True)) | dict(zip(mine, (_size(size) for size in shape_of(x)), strict=True))
    if any(sizes[name] != held.shape[theirs.index(name)] for name in summed):  # an axis of size 1 that is spread
        return
    b = Builder(graph, node, origin=origin_of(node))
    order = [*new, *summed]
    if order != theirs or len(order) != 2:
        width = _product([sizes[name] for name in summed])
        matrix = held.permute([theirs.index(name) for name in order]).reshape(-1, width).contiguous()
        weight = b.constant(f"{weight.target}_matrix", matrix)
    value = permuted(b, x, mine, [*kept, *summed])
    if len(summed) > 1:
        value = reshaped(b, value, [*(sizes[name] for name in kept), _product([sizes[name] for name in summed])])
    value = b.linear(value, weight)
    if len(new) > 1:
        value = reshaped(b, value, [sizes[name] for name in [*kept, *new]])
    value = permuted(b, value, [*kept, *new], out)
    if tensor_type(value) == tensor_type(node):
        graph.replace(node, value)


def _size(size: Any) -> int:
    return size if isinstance(size, int) else -1


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def permuted(b: Builder, value: Node, names: Letters, wanted: Letters) -> Node:
    return value if names == wanted else b.permute(value, [names.index(name) for name in wanted])


def reshaped(b: Builder, value: Node, sizes: Sequence[int]) -> Node:
    return b.call(aten("reshape.default"), (value, list(sizes)))
