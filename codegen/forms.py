"""Forms: for one op on one runtime, another function of the same meaning that is faster there, by measurement.

FORMS[op row, runtime] is a function with the op's signature. `lower` puts it in the place of the op's nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paretorch.ir.graph import Graph

FORMS: dict[tuple[str, str], Callable[..., Any]] = {}


def lower(graph: Graph, runtime: str) -> Graph:
    """The graph with each op in the form that this runtime runs fastest."""
    return graph
