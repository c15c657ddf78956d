"""The residual stream: chains of values of one type to which blocks add.

A residual sum is an add (or a tree of adds) of which one operand, the value before, is an ancestor of all others, the branches. Where
the next block reads the sum itself, the layout is pre-norm; where it reads a norm (or an activation) of the sum, that tail belongs to the
block, which is then post-norm. Blocks are cut out by dataflow alone: nothing looks at names or lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from paretorch.ir.analyze.facts import Block, Stream
from paretorch.ir.analyze.walk import nodes_in
from paretorch.ir.graph import Graph, arguments
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.types import Type, from_fake

_TAIL_LIMIT = 16  # nodes of a norm that is spelled out
_LAYER_LIMIT = 4  # blocks of a layer that stands alone
_SEARCH_LIMIT = 4096  # nodes of one block; keeps the whole analysis linear where a sum joins values that are far apart
_TAIL_KINDS = ("elementwise", "row", "reduce", "view", "scalar")


@dataclass
class Sum:
    """One residual sum. branches: the other leaves of its tree of adds; scaled: the value before is cast or multiplied by a number."""

    before: Node
    node: Node
    branches: tuple[Node, ...]
    scaled: bool
    after: Node  # node, or the end of its tail
    tail: tuple[Node, ...] = ()


def residual_streams(graph: Graph) -> tuple[Stream, ...]:
    """All chains of residual blocks, in the order of their first values; encoder and decoder come as two."""
    return _Finder(graph).streams()


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes = graph, graph.nodes
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self.places = {node.name: number for node, number in self.order.items()}
        self.types: dict[Node, Type] = {}
        self.computed: set[Node] = set()  # depends on an input
        for node in self.nodes:
            depends = node.op == "placeholder" or any(argument in self.computed for argument in node.all_input_nodes)
            if depends and node.op != "output":
                self.computed.add(node)

    def type(self, node: Node) -> Type:
        if node not in self.types:
            self.types[node] = from_fake(node.meta["val"])
        return self.types[node]

    def streams(self) -> tuple[Stream, ...]:
        sums = [found for node in self.nodes if (found := self.sum(node))]
        chains = self.chains(sums)
        made = [self.stream(chain) for chain in chains]
        return tuple(sorted(made, key=lambda stream: self.order_of(stream.values[0], stream.values[1])))

    def order_of(self, *names: str) -> tuple[int, ...]:
        return tuple(self.places[name] for name in names)

    # sums

    def sum(self, node: Node) -> Sum | None:
        """The residual sum whose outermost add is this node."""
        if not is_op(node, "add") or node not in self.computed or self._inner_add(node):
            return None
        leaves = [leaf for leaf in self._leaves(node) if leaf in self.computed]
        if len(leaves) < 2:
            return None
        skip = min(leaves, key=lambda leaf: self.order[_unscaled(leaf)])
        branches = tuple(leaf for leaf in leaves if leaf is not skip)
        for before in dict.fromkeys((skip, _unscaled(skip))):  # the nearer one first: a scaled embedding is itself the value before
            if self.type(before) == self.type(node) and all(self._reaches(before, branch) for branch in branches):
                found = Sum(before, node, branches, _is_scaled(skip, before), node)
                return found if self._works(self.between(before, node)) else None
        return None

    def _inner_add(self, node: Node) -> bool:
        """Whether this add is only an operand of another one."""
        users = [user for user in node.users if user in self.computed]
        alone = len(users) == 1 and len(node.users) == 1
        return alone and is_op(users[0], "add") and _plain_add(users[0]) and self.type(users[0]) == self.type(node)

    def _leaves(self, node: Node) -> list[Node]:
        if not _plain_add(node):
            given = arguments(node)
            return nodes_in([given["self"]])
        found = []
        for operand in nodes_in(list(node.args[:2])):
            inner = is_op(operand, "add") and operand in self.computed and self._inner_add(operand)
            found += self._leaves(operand) if inner else [operand]
        return found

    def _reaches(self, source: Node, target: Node) -> bool:
        """Whether target is computed from source; looks only at nodes after source."""
        return source in self._back(source, [target])

    def _back(self, source: Node, targets: Iterable[Node]) -> set[Node]:
        """Computed nodes that the targets depend on, not before source in order."""
        floor, todo = self.order[source], list(targets)
        found: set[Node] = set()
        while todo:
            node = todo.pop()
            if node not in found and node in self.computed and self.order[node] >= floor and len(found) < _SEARCH_LIMIT:
                found.add(node)
                if node is not source:
                    todo += node.all_input_nodes
        return found

    def between(self, before: Node, after: Node) -> list[Node]:
        """The nodes on some path from before to after, without before, with after."""
        reached, found = {before}, []
        for node in sorted(self._back(before, [after]), key=self.order.__getitem__):
            if node is not before and any(argument in reached for argument in node.all_input_nodes):
                reached.add(node)
                found.append(node)
        return found

    @staticmethod
    def _works(nodes: Iterable[Node]) -> bool:
        """Whether a product, convolution or attention is among them."""
        return any(op.kind in ("matrix", "convolution", "attention") for node in nodes if (op := op_of(node)))

    # chains

    def chains(self, sums: list[Sum]) -> list[list[Sum]]:
        """Sums that follow each other: the next one's value before is the last one's value after."""
        by_node = {found.node: found for found in sums}
        last_of: dict[Node, list[Sum]] = {}  # the value after -> the chain that ends there
        chains: list[list[Sum]] = []
        for found in sums:
            source, tail = self.tail(found.before, by_node)
            chain = last_of.get(source.node) if source else None
            if source is None or chain is None or not self.continues(chain, found, tail):
                chain = []
                chains.append(chain)
            else:
                source.after, source.tail = found.before, tail
                del last_of[source.node]
            chain.append(found)
            last_of[found.node] = chain
        for chain in chains:
            self.close(chain)
        return chains

    def continues(self, chain: list[Sum], found: Sum, tail: tuple[Node, ...]) -> bool:
        """Whether a sum is the next of a chain: of its type, and with a tail in between only if the blocks of the chain have one."""
        last = chain[-1]
        if self.type(found.before) != self.type(last.node):
            return False
        if len(chain) > 1:
            return bool(tail) == bool(chain[-2].tail)
        begins = {user.target for user in last.before.users if user in self.computed}
        return not tail or tail[-1].target not in begins or tail[-1].target == last.before.target

    def tail(self, value: Node, sums: dict[Node, Sum]) -> tuple[Sum | None, tuple[Node, ...]]:
        """The sum of which this value is a norm or an activation, with the nodes in between; (None, ()) if there is none."""
        if value in sums:
            return sums[value], ()
        found: set[Node] = set()
        todo, sources = [value], set()
        while todo:
            node = todo.pop()
            if node in sums:
                sources.add(node)
            elif node in self.computed and node not in found:
                op = op_of(node)
                if op is None or op.kind not in _TAIL_KINDS or len(found) >= _TAIL_LIMIT:
                    return None, ()
                found.add(node)
                todo += node.all_input_nodes
        if len(sources) != 1:
            return None, ()
        return sums[sources.pop()], tuple(sorted(found, key=self.order.__getitem__))

    def close(self, chain: list[Sum]) -> None:
        """Give the last sum of a chain the tail that its neighbours have, or that its own start shows."""
        last = chain[-1]
        pattern = chain[-2].tail if len(chain) > 1 else self._own_tail(last)
        current = last.node
        tail: list[Node] = []
        for expected in pattern:
            users = [user for user in current.users if user.target == expected.target]
            if not users or any(argument in self.computed and argument not in (last.node, *tail) for argument in users[0].all_input_nodes):
                return
            current = users[0]
            tail.append(current)
        if tail and self.type(current) == self.type(last.node) and self._only_through(last.node, tail):
            last.after, last.tail = current, tuple(tail)

    def _only_through(self, node: Node, tail: list[Node]) -> bool:
        """Whether nothing but the tail reads the sum."""
        return all(user in tail for inner in (node, *tail[:-1]) for user in inner.users)

    def _own_tail(self, last: Sum) -> tuple[Node, ...]:
        """Of a single block: a norm after the sum if the value before is one of the same kind and the block does not begin with one."""
        users = list(last.node.users)
        begins = [user for user in last.before.users if user is not last.node]
        same = len(users) == 1 and users[0].op == "call_function" and users[0].target == last.before.target
        norm = same and is_op(users[0], "layer_norm", "rms_norm", "batch_norm", "relu")
        return (users[0],) if norm and not any(user.target == users[0].target for user in begins) else ()

    # blocks

    def stream(self, chain: list[Sum]) -> Stream:
        blocks = tuple(self.block(found) for found in chain)
        values = (chain[0].before.name, *(found.after.name for found in chain))
        return Stream(values, blocks, group_layers(blocks))

    def block(self, found: Sum) -> Block:
        inside = self.between(found.before, found.after)
        kind, layout = block_kind(inside, self.computed), self.layout(found)
        before, after = found.before.name, found.after.name
        plain = len(found.branches) == 1 and not found.scaled and layout in ("pre", "sandwich") and found.branches[0] in found.node.args
        branch = found.branches[0].name if plain else None
        return Block(f"{before}->{after}", kind, layout, before, after, self.exclusive(found), branch)

    def exclusive(self, found: Sum) -> tuple[str, ...]:
        """What is computed only for the value after: calls all of whose users are among them, and the value after itself."""
        inside, todo = {found.after}, [found.after]
        while todo:
            for argument in todo.pop().all_input_nodes:
                fits = argument.op == "call_function" and argument is not found.before and argument not in inside
                if fits and all(user in inside for user in argument.users):
                    inside.add(argument)
                    todo.append(argument)
        return tuple(node.name for node in sorted(inside, key=self.order.__getitem__))

    def layout(self, found: Sum) -> str:
        if found.tail:
            return "post"
        if len(found.branches) > 1:
            return "parallel"
        return "sandwich" if self.ends_in_norm(found.before, found.branches[0]) else "pre"

    def ends_in_norm(self, before: Node, branch: Node) -> bool:
        """Whether the last thing that a branch does, but for scaling, is a norm after some product."""
        node = branch
        for _ in range(_TAIL_LIMIT):
            if is_op(node, "layer_norm", "rms_norm", "rsqrt"):
                return self._works(self.between(before, node))
            computed = [argument for argument in node.all_input_nodes if argument in self.computed]
            if not is_op(node, "mul", "to", "view", "add") or not computed:
                return False
            node = next((argument for argument in computed if is_op(argument, "rsqrt")), computed[0])
        return False


def _plain_add(node: Node) -> bool:
    return bool(arguments(node).get("alpha", 1) == 1)


def _unscaled(leaf: Node) -> Node:
    """The value before the casts and the multiplication with a number that may stand on a skip connection."""
    while is_op(leaf, "to", "clone", "alias") or (is_op(leaf, "mul") and len(leaf.all_input_nodes) == 1):
        if not leaf.all_input_nodes:
            break
        leaf = leaf.all_input_nodes[0]
    return leaf


def _is_scaled(leaf: Node, before: Node) -> bool:
    """Whether anything but an identity stands between the value before and the sum."""
    while leaf is not before and is_op(leaf, "clone", "alias"):
        leaf = leaf.all_input_nodes[0]
    return leaf is not before


def block_kind(nodes: Iterable[Node], computed: set[Node]) -> str:
    """What a block is, by what it holds."""
    nodes = list(nodes)
    products = [node for node in nodes if is_op(node, "matmul", "bmm", "baddbmm") and sum(n in computed for n in node.all_input_nodes) > 1]
    spelled = len(products) >= 2 and any(is_op(node, "softmax") for node in nodes)
    if spelled or any((op := op_of(node)) and op.kind == "attention" for node in nodes):
        return "attention"
    working = [node for node in nodes if (op := op_of(node)) and op.kind in ("matrix", "convolution")]
    return "feed_forward" if len(working) >= 2 and not any(_spans_places(node) for node in working) else "other"


def _spans_places(node: Node) -> bool:
    """Whether this is a convolution whose window is larger than one place."""
    op = op_of(node)
    if op is None or op.kind != "convolution":
        return False
    return any(size != 1 for size in node.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]


def group_layers(blocks: tuple[Block, ...]) -> tuple[tuple[str, ...], ...]:
    """The longest run of blocks whose kinds and layouts repeat, cut into its periods (the shortest period of those that cover as much).

    Where nothing repeats, all blocks are one layer if there are no more of them than a layer has (a conformer's: four).
    """
    marks = [(block.kind, block.layout) for block in blocks]
    best_start, best_period, best_length = 0, max(len(marks), 1), len(marks) if len(marks) <= 3 else 0
    for period in range(1, min(len(marks) // 2, 16) + 1):
        length = start = 0
        for place in range(period, len(marks) + 1):
            if place < len(marks) and marks[place] == marks[place - period]:
                length += 1
                continue
            whole = (length + period) // period * period if length >= period else 0
            if whole > best_length or (whole == best_length and period < best_period):
                best_start, best_period, best_length = start, period, whole
            start, length = place - period + 1, 0
    if best_length == 0 and len(marks) <= _LAYER_LIMIT:
        best_period = best_length = max(len(marks), 1)
    names = [block.name for block in blocks[best_start : best_start + best_length]]
    return tuple(tuple(names[place : place + best_period]) for place in range(0, len(names), best_period))
