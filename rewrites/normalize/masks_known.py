"""What is known of a value before the model runs: constants, and values computed from constants and fixed sizes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.rewrites.normalize.heads import is_tensor, spelled, step_back

LARGEST = 1 << 24  # elements; larger results are not computed ahead of time


class Known:
    """Values of one graph that do not depend on its inputs, computed when asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._fixed: dict[Node, bool] = {}
        self._values: dict[Node, Any] = {}
        for node in graph.fx.nodes:
            self._is_fixed(node)

    def _is_fixed(self, node: Node) -> bool:
        if node not in self._fixed:
            self._fixed[node] = self.graph.known(node) is not None or (
                node.op == "call_function"
                and not _is_random(node)
                and _is_small(node)
                and all(self._is_fixed(argument) for argument in node.all_input_nodes)
            )
        return self._fixed[node]

    def value(self, node: Node) -> Any:
        """What the node makes, or None if it depends on an input, is random or is too large."""
        if not self._is_fixed(node):
            return None
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = self.graph.constants[str(node.target)]
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.value)
                with torch.no_grad():
                    self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor of a node that does not depend on inputs."""
        found = self.value(node) if isinstance(node, Node) else None
        return found if isinstance(found, Tensor) else None

    def number(self, argument: Any) -> float | None:
        """The number that an argument stands for: a Python number, or a constant tensor of one element."""
        if isinstance(argument, (int, float)):
            return float(argument)
        found = self.tensor(argument)
        is_number = found is not None and found.numel() == 1 and not found.is_complex()
        return float(found.item()) if found is not None and is_number else None

    def uniform(self, argument: Any) -> float | None:
        """The number that every element of an argument is, if that is known."""
        found = self.number(argument)
        if found is not None or not is_tensor(argument):
            return found
        node, name = _unexpanded(argument), spelled(_unexpanded(argument))
        if name in ("full", "full_like", "new_full", "fill"):
            return self.number(arguments(node).get("fill_value", arguments(node).get("value")))
        if name in ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"):
            return float("ones" in name)
        tensor = self.tensor(node)
        if tensor is None or tensor.numel() == 0 or tensor.is_complex():
            return None
        first = tensor.flatten()[0]
        return float(first.item()) if bool((tensor == first).all()) else None


def _unexpanded(node: Node) -> Node:
    """The value behind views and expansions; only its elements matter here, not their places."""
    while True:
        behind = step_back(node, [() for _ in shape_of(node)]) if spelled(node) in ("expand", "clone", "alias", "detach") else None
        if behind is None:
            return node
        node = behind[0]


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_small(node: Node) -> bool:
    if not is_tensor(node):
        return True
    sizes = shape_of(node)
    if not all(isinstance(size, int) for size in sizes):
        return False
    total = 1
    for size in sizes:
        total *= size
    return total <= LARGEST
