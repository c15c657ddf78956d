"""Coordinates as text: which element of an operand belongs to an element of the result, through broadcasting, views and concatenation.

A coordinate is one text per axis, "" for zero: ("at_0", "", "at_2 + 32"). Sizes are ints, or sympy expressions in symbols that the kernel gets
as arguments of their own names. What a view does to axes is found by the op table's axis rule, so an op is followed if its rule is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import is_op, op_of

At = tuple[str, ...]


def size_text(size: Any) -> str:
    """A size as source text; symbols stand under their own names."""
    return str(size).replace("**", "^") if isinstance(size, int) else str(sympy.expand(size))


def is_plain(size: Any) -> bool:
    """Whether a size is a number, or sums and products of symbols and whole numbers, which is what texts are made of."""
    if isinstance(size, int):
        return True
    return all(part.is_Symbol or part.is_Integer or part.is_Add or part.is_Mul for part in sympy.preorder_traversal(size))


def times(text: str, size: Any) -> str:
    """ "at_1 * 64"; sums are put in brackets, zero stays zero."""
    if not text or size == 1:
        return text
    return f"{_bracketed(text, '[+%/-]')} * {_bracketed(size_text(size), '[+-]')}"


def plus(*texts: str) -> str:
    return " + ".join(text for text in texts if text)


def divided(text: str, size: Any) -> str:
    if not text or size == 1:
        return text
    return f"{_bracketed(text, '[+*%/-]')} // {_bracketed(size_text(size), '[+*-]')}"


def remainder(text: str, size: Any) -> str:
    if not text:
        return ""
    return f"{_bracketed(text, '[+*-]')} % {_bracketed(size_text(size), '[+*-]')}"


def _bracketed(text: str, operators: str) -> str:
    return f"({text})" if re.search(operators, text) else text


def product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def broadcast(at: At, result: Sequence[Any], operand: Sequence[Any]) -> At:
    """The coordinate in an operand that broadcasts to the result."""
    lead = len(result) - len(operand)
    return tuple("" if size == 1 else at[lead + axis] for axis, size in enumerate(operand))


# views: from a coordinate of the result to one of the operand


def source_of(node: Any) -> Node | None:
    """The value that a view looks at; None if it is no view that coordinates can be followed through."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if is_op(node, "getitem"):
        parts = node.args[0]
        return parts.all_input_nodes[0] if isinstance(parts, Node) and _is_cut_at_numbers(parts) else None
    op = op_of(node)
    is_copy = op is not None and op.name == "clone"
    if op is None or not (op.kind == "view" or is_copy) or _rule(node) not in FOLLOWED:
        return None
    source = node.all_input_nodes[0]
    return source if len(node.all_input_nodes) == 1 and _follows(node) else None


def at_source(node: Node, at: At) -> At:
    """The coordinate in `source_of(node)` of the element at `at` of a view."""
    if is_op(node, "getitem"):
        return _of_part(node, at)
    return FOLLOWED[_rule(node)](node, at)


def _is_cut_at_numbers(parts: Node) -> bool:
    """Whether a node with several outputs takes its operand apart, at places that are known."""
    if _rule(parts) != "split":
        return _rule(parts) == "unbind"
    axis = _axis(parts, "dim", len(shape_of(parts.all_input_nodes[0])))
    return all(isinstance(part.shape[axis], int) for part in parts.meta["val"])


def _rule(node: Node) -> str:
    op = op_of(node)
    return op.axes or "" if op is not None else ""


def _follows(node: Node) -> bool:
    """Whether its numbers are known: places may be computed in the graph."""
    given = arguments(node)
    places = [given.get(name) for name in ("index", "start", "step", "dim", "dim0", "dim1") if name in given]
    sizes = [*shape_of(node), *shape_of(node.all_input_nodes[0])]
    known = all(isinstance(place, (int, tuple, list, type(None))) for place in places) and all(map(is_plain, sizes))
    counted = [place for name in ("index", "start") if (place := given.get(name)) is not None]
    from_end = any(isinstance(place, int) and place < 0 for place in counted) and not all(isinstance(size, int) for size in sizes)
    return known and not from_end


def _axis(node: Node, name: str, rank: int) -> int:
    return int(arguments(node)[name]) % rank


def _permute(node: Node, at: At) -> At:
    dims = [dim % len(at) for dim in arguments(node)["dims"]]
    return tuple(at[dims.index(axis)] for axis in range(len(at)))


def _transpose(node: Node, at: At) -> At:
    given, swapped = arguments(node), list(at)
    first, second = (given.get("dim0", 0) % len(at), given.get("dim1", len(at) - 1) % len(at))
    swapped[first], swapped[second] = at[second], at[first]
    return tuple(swapped)


def _unsqueeze(node: Node, at: At) -> At:
    axis = _axis(node, "dim", len(at))
    return at[:axis] + at[axis + 1 :]


def _select(node: Node, at: At) -> At:
    shape = shape_of(node.all_input_nodes[0])
    axis, index = _axis(node, "dim", len(shape)), arguments(node)["index"]
    place = index if index >= 0 else index + shape[axis]
    return (*at[:axis], _number(place), *at[axis:])


def _slice(node: Node, at: At) -> At:
    shape = shape_of(node.all_input_nodes[0])
    axis, given = _axis(node, "dim", len(shape)), arguments(node)
    start = given["start"] or 0
    start = start if start >= 0 else max(start + shape[axis], 0)
    moved = plus(times(at[axis], given.get("step") or 1), _number(start))
    return (*at[:axis], moved, *at[axis + 1 :])


def _of_part(node: Node, at: At) -> At:
    """An output of a split or unbind."""
    parts, place = node.args
    assert isinstance(parts, Node) and isinstance(place, int)  # source_of asked  # noqa: PT018
    shape = shape_of(parts.all_input_nodes[0])
    axis = _axis(parts, "dim", len(shape))
    if _rule(parts) == "unbind":
        return (*at[:axis], _number(place), *at[axis:])
    start = sum(int(part.shape[axis]) for part in parts.meta["val"][:place])
    return (*at[:axis], plus(at[axis], _number(start)), *at[axis + 1 :])


def _number(place: Any) -> str:
    return "" if place == 0 else size_text(place)


def _squeeze(node: Node, at: At) -> At:
    """Axes of length one go; those that stay have the coordinates in order."""
    source, left = shape_of(node.all_input_nodes[0]), list(zip(shape_of(node), at, strict=True))
    dims = arguments(node).get("dim")
    named = range(len(source)) if dims is None else [d % len(source) for d in ([dims] if isinstance(dims, int) else dims)]
    return tuple("" if size == 1 and axis in named else left.pop(0)[1] for axis, size in enumerate(source))


def _view(node: Node, at: At) -> At:
    """The same elements in the same order: axes are taken in groups of equal size on both sides."""
    found: list[str] = []
    for outer, inner in _groups(shape_of(node), shape_of(node.all_input_nodes[0])):
        sizes = [size for _, size in outer]
        flat = plus(*(times(at[axis], product(sizes[place + 1 :])) for place, (axis, _) in enumerate(outer)))
        left = [size for _, size in inner]
        real = [place for place, size in enumerate(left) if size != 1]
        for place in range(len(left)):
            if place not in real:
                found.append("")
                continue
            shifted = divided(flat, product(left[place + 1 :]))
            found.append(shifted if place == real[0] else remainder(shifted, left[place]))
    return tuple(found)


Axes = list[tuple[int, Any]]


def _groups(result: Sequence[Any], source: Sequence[Any]) -> list[tuple[Axes, Axes]]:
    """Runs of axes of result and source with equal numbers of elements, as short as possible."""
    groups: list[tuple[Axes, Axes]] = []
    ours, theirs = list(enumerate(result)), list(enumerate(source))
    while ours or theirs:
        outer, inner = [ours.pop(0)] if ours else [], [theirs.pop(0)] if theirs else []
        while (a := product([s for _, s in outer])) != (b := product([s for _, s in inner])):
            is_less = a < b if isinstance(a, int) and isinstance(b, int) else len(outer) <= len(inner)
            if (is_less or not theirs) and ours:
                outer.append(ours.pop(0))
            elif theirs:
                inner.append(theirs.pop(0))
            else:
                break
        groups.append((outer, inner))
    return groups


FOLLOWED: dict[str, Callable[[Node, At], At]] = {
    "permute": _permute,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "slice": _slice,
    "view": _view,
    "expand": lambda node, at: broadcast(at, shape_of(node), shape_of(node.all_input_nodes[0])),
    "pointwise": lambda node, at: at,
}
