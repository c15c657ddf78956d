"""From which size on a rewrite pays: prices of a graph before and after it, at other sizes than the example's."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from paretorch.cost_model.work import at_sizes
from paretorch.ir.graph import Graph
from paretorch.ir.types import size_of

Seconds = Callable[[Graph], float]
FURTHEST = 64  # times the example's size is the largest that is looked at


def break_evens(before: Graph, after: Graph, seconds: Seconds) -> dict[sympy.Symbol, int | None]:
    """For each size that may vary, the smallest value from which `after` is predicted to be faster, the others as in the example.

    None where it is not even at FURTHEST times the example's size. The saving is taken to grow with the size. Empty if no size may vary.
    seconds: predicted of a graph, asked inside of `at_sizes`.
    """
    return {symbol: _first_that_pays(symbol, low, high, before, after, seconds) for symbol, (low, high) in _symbols(before).items()}


def sentence(found: dict[sympy.Symbol, int | None], graph: Graph) -> str:
    """From which size it pays along which axis of which input, or that it does at no size looked at; empty if no size may vary."""
    parts = []
    for symbol, size in found.items():
        place = _place(symbol, graph)
        parts.append(
            f"pays at no size of {place} up to {_symbols(graph)[symbol][1]}" if size is None else f"pays from {size} along {place}"
        )
    return "; ".join(parts)


def _first_that_pays(symbol: sympy.Symbol, low: int, high: int, before: Graph, after: Graph, seconds: Seconds) -> int | None:
    def pays(size: int) -> bool:
        with at_sizes({symbol: size}):
            return seconds(after) < seconds(before)

    if not pays(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    return low


def _symbols(graph: Graph) -> dict[sympy.Symbol, tuple[int, int]]:
    """The sizes of the inputs that vary, with the range to look at."""
    environment, found = graph.fake_mode.shape_env, {}
    for node in graph.inputs:
        for size in getattr(node.meta.get("val"), "shape", ()):
            expression = size_of(size)
            if environment is not None and isinstance(expression, sympy.Symbol):
                bounds = environment.var_to_range[expression]
                low = int(bounds.lower) if bounds.lower.is_Integer else 1
                furthest = FURTHEST * max(int(environment.var_to_val.get(expression, 1)), 1)
                high = min(int(bounds.upper), furthest) if bounds.upper.is_Integer else furthest
                found[expression] = (max(low, 1), max(high, low, 1))
    return found


def _place(symbol: sympy.Symbol, graph: Graph) -> str:
    """The first axis of an input that has this size."""
    for node in graph.inputs:
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if size_of(size) == symbol:
                return f"axis {axis} of {node.target}"
    return str(symbol)
