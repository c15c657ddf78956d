"""What the rules of this family share: when a block may go, and taking it out.

A block of the residual stream is replaced by the identity: all that read the value after it read the value before it. In a pre-norm
layout this drops the branch, x + f(norm(x)) -> x; in a post-norm layout the sum and its norm, norm(x + f(x)) -> x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from paretorch.ir.analyze import Block, Facts, analyze
from paretorch.ir.errors import PlanError, ShapeError
from paretorch.ir.graph import Graph, origin_of, type_of
from paretorch.ir.ops import aten
from paretorch.rewrites.rule import Knob, Refusal, Site

JOIN = "+"  # between the blocks of a site


def blocks_of(facts: Facts) -> Iterator[Block]:
    """All blocks of all streams."""
    return (block for stream in facts.streams for block in stream.blocks)


def region(before: Node, after: Node, position: dict[Node, int]) -> set[Node]:
    """The nodes on some path from before to after, without before, with after."""
    back, todo = set(), [after]
    while todo:
        node = todo.pop()
        if node not in back and position[node] > position[before]:
            back.add(node)
            todo += node.all_input_nodes
    found = {before}
    for node in sorted(back, key=position.__getitem__):
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found - {before}


def refusal_of(graph: Graph, block: Block, nodes: dict[str, Node], position: dict[Node, int]) -> str | None:
    """Why this block may not go; None if it may."""
    before, after = nodes[block.before], nodes[block.after]
    if type_of(before) != type_of(after):
        return f"{block.before} is {type_of(before)} and {block.after} is {type_of(after)}; a block that changes the type has no identity"
    inside = region(before, after, position)
    for node in sorted(inside - {after}, key=position.__getitem__):
        outside = [user for user in node.users if user not in inside]
        if outside:
            reader = "the model returns it" if outside[0].op == "output" else f"{outside[0].name} ({origin_of(outside[0])}) reads it"
            return f"{node.name} ({origin_of(node)}) is computed inside of the block and used outside of it: {reader}"
    return None


def offer(rule: str, graph: Graph, groups: Iterable[tuple[Block, ...]]) -> Iterator[Site | Refusal]:
    """A site, or a refusal, for each group of consecutive blocks. It is named by the values after its blocks."""
    nodes = {node.name: node for node in graph.nodes}
    position = {node: number for number, node in enumerate(graph.nodes)}
    for group in groups:
        name = JOIN.join(block.after for block in group)
        reasons = [reason for block in group if (reason := refusal_of(graph, block, nodes, position))]
        label = origin_of(nodes[group[-1].after]).path
        yield Refusal(rule, name, reasons[0]) if reasons else Site(name, label or name)


def remove(rule: str, graph: Graph, site: Site, knob: Knob) -> Graph:
    """The graph without the site's blocks (those that still stand). Raises PlanError if none of them stands or one may not go."""
    if not knob:
        return graph
    graph, removed = graph.copy(), 0
    for name in site.name.split(JOIN):
        block = next((block for block in blocks_of(analyze(graph)) if block.after == name), None)
        if block is None:
            continue
        nodes = {node.name: node for node in graph.nodes}
        reason = refusal_of(graph, block, nodes, {node: number for number, node in enumerate(graph.nodes)})
        if reason:
            raise PlanError(f"{rule} at {site.name}: {reason}")
        before, after = nodes[block.before], nodes[block.after]
        graph.replace(after, before)
        graph.clean()
        _settle(graph, before)
        removed += 1
    if not removed:
        raise PlanError(f"{rule} at {site.name}: no block of the residual stream ends there; an earlier rewrite took it out or changed it")
    return graph


def _settle(graph: Graph, changed: Node) -> None:
    """Types and strides downstream of a value that took another's place; a view that its strides do not allow becomes a reshape."""
    dirty = {changed}
    for node in graph.calls:
        if not any(argument in dirty for argument in node.all_input_nodes):
            continue
        old = node.meta["val"]
        try:
            node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))
        except ShapeError:
            if node.target is not aten("view.default"):
                raise
            node.target = aten("reshape.default")
            node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))
        if _layout(old) != _layout(node.meta["val"]):
            dirty.add(node)


def _layout(value: object) -> object:
    """What makes two values of a node equal for those that read it."""
    if isinstance(value, (tuple, list)):
        return [_layout(part) for part in value]
    stride = getattr(value, "stride", None)
    return (str(stride()), str(value.shape)) if stride is not None else str(value)  # type: ignore[attr-defined]
