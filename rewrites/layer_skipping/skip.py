"""What the rules of this family share: when a block may go, and taking it out.

A block of the residual stream is replaced by the identity: all that read the value after it read the value before it. In a pre-norm
layout this drops the branch, x + f(norm(x)) -> x; in a post-norm layout the sum and its norm, norm(x + f(x)) -> x. Of a parallel layer,
x + f(norm(x)) + g(norm(x)), one branch may go alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from paretorch.ir.analyze import Block, Facts, analyze
from paretorch.ir.analyze.residual import block_kind
from paretorch.ir.errors import PlanError, ShapeError
from paretorch.ir.graph import Graph, arguments, origin_of, type_of
from paretorch.ir.ops import aten, is_op
from paretorch.rewrites.rule import JOIN, Knob, Refusal, Site


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


def refusal_of(block: Block, nodes: dict[str, Node], position: dict[Node, int], branch: Node | None = None) -> str | None:
    """Why this block, or one branch of it, may not go; None if it may."""
    before, after = nodes[block.before], nodes[block.after]
    if type_of(before) != type_of(after):
        return f"{block.before} is {type_of(before)} and {block.after} is {type_of(after)}; a block that changes the type has no identity"
    inside = region(before, after, position)
    for node in sorted(inside - {after} if branch is None else region(before, branch, position), key=position.__getitem__):
        outside = [user for user in node.users if user not in inside]
        if outside:
            return f"{node.name} ({origin_of(node)}) is computed inside of the block and used outside of it: {_reading(outside[0])}"
    return None


def _reading(user: Node) -> str:
    """What becomes of a value: who reads it, past views."""
    while is_op(user, "view", "permute", "transpose", "unsqueeze", "expand", "clone") and len(user.users) == 1:
        user = next(iter(user.users))
    return "the model returns it" if user.op == "output" else f"{user.name} ({origin_of(user)}) reads it"


def offer(rule: str, graph: Graph, groups: Iterable[tuple[Block, ...]]) -> Iterator[Site | Refusal]:
    """A site, or a refusal, for each group of consecutive blocks. It is named by the values after its blocks."""
    nodes = {node.name: node for node in graph.nodes}
    position = {node: number for number, node in enumerate(graph.nodes)}
    for group in groups:
        name = JOIN.join(block.after for block in group)
        reasons = [reason for block in group if (reason := refusal_of(block, nodes, position))]
        label = origin_of(nodes[group[-1].after]).path
        yield Refusal(rule, name, reasons[0]) if reasons else Site(name, label or name)


def offer_halves(rule: str, graph: Graph, facts: Facts, kind: str) -> Iterator[Site | Refusal]:
    """A site, or a refusal, for each block of this kind, and for each branch of this kind in a parallel layer, which its own value names."""
    nodes = {node.name: node for node in graph.nodes}
    position = {node: number for number, node in enumerate(graph.nodes)}
    for block in blocks_of(facts):
        if block.layout != "parallel":
            yield from offer(rule, graph, [(block,)] if block.kind == kind else [])
            continue
        for branch, found in _branches(graph, block).items():
            if found == kind:
                reason = refusal_of(block, nodes, position, branch) or _refused_branch(branch)
                yield Refusal(rule, branch.name, reason) if reason else Site(branch.name, origin_of(branch).path or branch.name)


def _branches(graph: Graph, block: Block) -> dict[Node, str]:
    """What a parallel layer adds to the stream, with the kind of each branch."""
    nodes = {node.name: node for node in graph.nodes}
    position = {node: number for number, node in enumerate(graph.nodes)}
    before, computed = nodes[block.before], {node for node in graph.nodes if node.op != "get_attr"}
    inner, found = [nodes[block.after]], dict[Node, str]()
    while inner:
        for leaf in inner.pop().all_input_nodes:
            inside = region(before, leaf, position)
            if is_op(leaf, "add") and len(leaf.users) == 1 and leaf in inside and not _is_sum(leaf):
                inner.append(leaf)
            elif leaf in inside:
                found[leaf] = block_kind(inside, computed)
    return found


def _is_sum(node: Node) -> bool:
    """Whether an addition is of a branch's own: of a bias, or not plain."""
    return any(argument.op == "get_attr" for argument in node.all_input_nodes) or arguments(node).get("alpha", 1) != 1


def _refused_branch(branch: Node) -> str | None:
    """Why this branch may not be left out of the sum that reads it; None if it may."""
    rest = _rest(branch)
    if rest is not None and type_of(rest) == type_of(next(iter(branch.users))):
        return None
    return f"{branch.name} ({origin_of(branch)}) is not simply added to something of the stream's type, so there is no sum without it"


def _rest(branch: Node) -> Node | None:
    """The other operand of the one plain addition that reads a branch."""
    users = list(branch.users)
    if len(users) != 1 or not is_op(users[0], "add") or arguments(users[0]).get("alpha", 1) != 1:
        return None
    others = [argument for argument in users[0].all_input_nodes if argument is not branch]
    return others[0] if len(others) == 1 else None


def _take_out(graph: Graph, branch: Node) -> Node:
    """What stands for the sum that reads a branch, without it. A sum of more than two keeps its node, and so its name."""
    summed, rest = next(iter(branch.users)), _rest(branch)
    assert rest is not None  # else the branch was refused
    if not is_op(rest, "add") or list(rest.users) != [summed] or _is_sum(rest):
        return rest
    summed.args = rest.args
    return summed


def remove(rule: str, graph: Graph, site: Site, knob: Knob) -> Graph:
    """The graph without the site's blocks (those that still stand). Raises PlanError if none of them stands or one may not go."""
    if not knob:
        return graph
    graph, removed = graph.copy(), 0
    for name in site.parts:
        found = _found(graph, name)
        if found is None:
            continue
        (block, branch), nodes = found, {node.name: node for node in graph.nodes}
        position = {node: number for number, node in enumerate(graph.nodes)}
        reason = refusal_of(block, nodes, position, branch) or (_refused_branch(branch) if branch is not None else None)
        if reason:
            raise PlanError(f"{rule} at {site.name}: {reason}")
        after = nodes[block.after] if branch is None else next(iter(branch.users))
        before = nodes[block.before] if branch is None else _take_out(graph, branch)
        if after is not before:
            graph.replace(after, before)
        graph.clean()
        settle(graph, before)
        removed += 1
    if not removed:
        raise PlanError(f"{rule} at {site.name}: no block of the residual stream ends there; an earlier rewrite took it out or changed it")
    return graph


def _found(graph: Graph, name: str) -> tuple[Block, Node | None] | None:
    """The block that ends in a value of this name, or the parallel layer of which it is a branch, and that branch."""
    blocks = list(blocks_of(analyze(graph)))
    for block in blocks:
        if name in (block.after, block.branch):  # a branch alone, where others were taken out before
            return block, None
    for block in blocks:
        branch = next((node for node in _branches(graph, block) if node.name == name), None) if block.layout == "parallel" else None
        if branch is not None:
            return block, branch
    return None


def settle(graph: Graph, changed: Node) -> None:
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
