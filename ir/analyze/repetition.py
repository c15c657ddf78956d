"""Repetition: blocks that compute the same thing with other weights, found by structural hashing in linear time.

Two regions are isomorphic if their ops, attributes, types and wiring agree; constants agree if their types do. Prices and measurements
of one hold for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.facts import Block, Repetition, Stream
from paretorch.ir.graph import Graph
from paretorch.ir.types import from_fake


def repetition(graph: Graph, streams: Iterable[Stream]) -> Repetition:
    """Classes of two or more isomorphic blocks, in order of their first; the nodes of a class's regions correspond place by place."""
    nodes = {node.name: node for node in graph.nodes}
    classes: dict[Any, list[tuple[str, ...]]] = {}
    for stream in streams:
        for block in stream.blocks:
            order = _walk(nodes, block)
            classes.setdefault(_signature(order, nodes[block.before]), []).append(tuple(node.name for node in order))
    return Repetition(tuple(tuple(regions) for regions in classes.values() if len(regions) > 1))


def _walk(nodes: dict[str, Node], block: Block) -> list[Node]:
    """The block's nodes, operands first, in an order that depends on the wiring only."""
    inside, order = set(block.nodes), []
    seen: set[Node] = set()
    todo: list[tuple[Node, bool]] = [(nodes[block.after], False)]
    while todo:
        node, operands_done = todo.pop()
        if operands_done:
            order.append(node)
        elif node not in seen and node.name in inside:
            seen.add(node)
            todo.append((node, True))
            todo += [(argument, False) for argument in reversed(node.all_input_nodes)]
    return order


def _signature(order: list[Node], before: Node) -> Any:
    """A hashable description of a region."""
    labels: dict[Node, Any] = {node: number for number, node in enumerate(order)}
    labels[before] = ("before", str(from_fake(before.meta["val"])))

    def describe(argument: Any) -> Any:
        if isinstance(argument, Node):
            if argument not in labels:
                role = "constant" if argument.op == "get_attr" else "outside"
                labels[argument] = (role, len(labels), str(from_fake(argument.meta["val"])))
            return labels[argument]
        if isinstance(argument, (list, tuple)):
            return tuple(describe(part) for part in argument)
        return repr(argument)

    def row(node: Node) -> Any:
        attributes = tuple((name, describe(value)) for name, value in sorted(node.kwargs.items()))
        return str(node.target), describe(node.args), attributes, str(from_fake(node.meta["val"]))

    return tuple(row(node) for node in order)
