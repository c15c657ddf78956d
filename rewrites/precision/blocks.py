"""The sites of precision: the whole model, and the blocks of its residual streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph, origin_of
from paretorch.rewrites.rule import Knob, Site


def blocks_with(graph: Graph, facts: Facts, values: Callable[[list[Node]], tuple[Knob, ...] | None]) -> Iterator[Site]:
    """Each block of a residual stream for whose nodes `values` gives the knob's values that are legal there, not None."""
    by_name = {node.name: node for node in graph.nodes}
    for stream in facts.streams:
        for block in stream.blocks:
            found = values([by_name[name] for name in block.nodes if name in by_name])
            if found is not None:
                yield Site(block.name, origin_of(by_name[block.after]).path, found)


def block_of(graph: Graph, site: Site) -> set[Node]:
    """The nodes between the two stream values that a block's name holds. Empty if one of them is gone."""
    before, after = graph.node(site.parts[0]), graph.node(site.parts[-1])
    if before is None or after is None or before is after:
        return set()
    below = closure(before, lambda node: node.users)
    return {node for node in closure(after, lambda node: node.all_input_nodes) & below if node.op == "call_function"} | {after}


def closure(start: Node, step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that `step` reaches from a node, without the node."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        for node in step(waiting.pop()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
