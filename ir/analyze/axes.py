"""Token axes: which dimension of which value is an axis that attention mixes, and what every node does to it.

Every dimension of every value is a product of atoms, followed by dataflow: inputs and constants begin with new atoms, and each op
passes them on by the axis rule that its row of the op table names. A token axis is an atom that is both the query axis and the key
axis of an attention; where the results of one over all tokens are brought down to merged rows, it is the axis of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dim
from paretorch.ir.analyze.facts import Atom, AxisFacts, AxisMap, TokenAxis, Use
from paretorch.ir.analyze.walk import Event, Mixer, Walk, flat, place
from paretorch.ir.graph import Graph
from paretorch.ir.ops import op_of
from paretorch.ir.ops.tokens import lowered_by

# What stands when a node treats one axis in several ways: the first of these.
_ORDER = ("opaque", "bakes_length", "returns", "positions", "appends", "pools", "mixes", "selects", "pointwise")


def token_axes(graph: Graph) -> AxisFacts:
    """The axes of every value, and the token axes with all their uses."""
    return _read(graph).facts()


def axis_of(graph: Graph, atom: Atom) -> TokenAxis:
    """All uses of any axis, such as that of a batch. atom: of the facts of this graph, as it is now."""
    reader = _read(graph)
    reader.facts()
    return reader.axis(atom.number)


def _read(graph: Graph) -> _Reader:
    walk = Walk(graph)
    nodes = graph.nodes
    for node in nodes:
        walk.visit(node)
    return _Reader(walk, nodes)


class _Reader:
    """Reads facts from a finished walk."""

    def __init__(self, walk: Walk, nodes: list[Node]) -> None:
        self.walk, self.atoms, self.nodes = walk, walk.atoms, nodes
        self.order = {node.name: number for number, node in enumerate(nodes)}
        self.named = {node.name: node for node in nodes}
        self.events: dict[str, list[Any]] = defaultdict(list)
        for event in walk.events:
            self.events[event.node].append(event)

    def facts(self) -> AxisFacts:
        axes = self._self_attended()
        self.values: dict[Node, set[int]] = {
            node: {self.atoms.find(atom) for dim in flat(dims) for atom in self.atoms.resolve(dim)} for node, dims in self.walk.maps.items()
        }
        self.carriers: dict[int, list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            near = [self.values[argument] for argument in (node, *node.all_input_nodes) if argument in self.values]
            for atom in sorted(set().union(*near)):
                self.carriers[atom].append(number)
        maps = {node.name: self._map(dims) for node, dims in self.walk.maps.items() if not any(isinstance(part, list) for part in dims)}
        tokens = [self.axis(atom, mixers) for atom, mixers in axes.items()]
        return AxisFacts(maps, tuple(sorted(tokens, key=lambda axis: (self.order[axis.atom.born], axis.atom.number))))

    def _self_attended(self) -> dict[int, list[Mixer]]:
        """Atoms of which some mixer has both its queries and its keys, or to which tokens were brought back; a product of several, like height x
        width, becomes one."""
        found: dict[Dim, list[Mixer]] = defaultdict(list)
        for mixer in self.walk.mixers:
            query, key = self.atoms.resolve(mixer.query), self.atoms.resolve(mixer.key)
            if query and query == key:
                found[self._axis_of(mixer, query)].append(mixer)
                reason = f"{mixer.node} mixes another axis at each place of this one, so the places must stay aligned"
                self.events[mixer.node].append(Event(mixer.node, "positions", mixer.outer, reason))
        births = {self.atoms.resolve(dim): name for name, dim in self.walk.restored if dim}
        for dim in births:
            found[dim] += []
        axes: dict[int, list[Mixer]] = {}
        for dim, mixers in sorted(found.items(), key=lambda item: -len(item[0])):
            born = mixers[0].node if mixers else births[dim]
            axes.setdefault(dim[0] if len(dim) == 1 else self.atoms.fuse(dim, born), []).extend(mixers)
        self._settle_births(axes)
        return axes

    def _axis_of(self, mixer: Mixer, over: Dim) -> Dim:
        """The axis that the attention belongs to: the one it runs over, or that of the rows to which its results are brought down."""
        lowered = lowered_by(self.named[mixer.node])
        kept = self.walk.maps.get(lowered[-1].args[1]) if lowered else None  # type: ignore[arg-type]
        return self.atoms.resolve(kept[1]) if kept and len(kept) == 2 else over

    def _settle_births(self, axes: dict[int, list[Mixer]]) -> None:
        """A fused axis is born where it first stands in one dimension."""
        for node in self.nodes:
            for dim in flat(self.walk.maps.get(node, ())):
                resolved = self.atoms.resolve(dim)
                for atom in resolved:
                    if atom in axes and self.order[self.atoms.born[atom]] > self.order[node.name]:
                        self.atoms.born[atom] = node.name

    def _atom(self, number: int) -> Atom:
        return Atom(number, self.atoms.sizes[number], self.atoms.born[number])

    def _map(self, dims: Any) -> AxisMap:
        return tuple(tuple(self._atom(atom) for atom in self.atoms.resolve(dim)) for dim in dims)

    def axis(self, atom: int, mixers: Sequence[Mixer] = ()) -> TokenAxis:
        family, born = self.atoms.family(atom), self.order[self.atoms.born[atom]]
        carrying = sorted({number for member in family for number in self.carriers[member] if number >= born})
        uses = [use for number in carrying for use in self._uses(self.nodes[number], atom, family)]
        names, causal = tuple(mixer.node for mixer in mixers), any(mixer.causal for mixer in mixers)
        return TokenAxis(self._atom(atom), names, tuple(uses), causal, frozenset(family))

    def _uses(self, node: Node, atom: int, family: set[int]) -> list[Use]:
        """How one node treats an axis: its events on it, else by whether its sizes are baked in, else pointwise."""
        mine = [event for event in self.events[node.name] if any(self.atoms.find(part) in family for part in event.atoms)]
        found: dict[str, str] = {}
        for event in mine:
            found[event.kind] = found.get(event.kind) or event.reason
        if not found:
            kind, reason = self._reshaping(node, atom, family)
            found[kind] = reason
        return [Use(node.name, kind, found[kind]) for kind in sorted(found, key=_ORDER.index)]

    def _reshaping(self, node: Node, atom: int, family: set[int]) -> tuple[str, str]:
        op = op_of(node)
        if op is None or op.axes not in ("view", "expand", "repeat") or not isinstance(node.args[0], Node):
            return "pointwise", ""
        ours, inputs = self.values[node] & family, self.values[node.args[0]] & family
        if op.axes == "repeat" and ours != inputs:
            return "appends", f"{place(node)} repeats the axis of {self.atoms.sizes[atom]}"
        if op.axes == "view" and ours != inputs and node.name != self.atoms.born[atom]:
            shapes = f"{list(self.walk.shape(node.args[0]))} as {list(self.walk.shape(node))}"
            return "bakes_length", f"{place(node)} views {shapes}, which splits or blends the axis of {self.atoms.sizes[atom]}"
        baked = node.args[1] if len(node.args) > 1 else ()
        dims = self.walk.maps[node]
        literal = isinstance(baked, (list, tuple)) and any(
            size != -1 and any(self.atoms.find(part) in family for part in self.atoms.resolve(dim))
            for size, dim in zip(baked, dims, strict=False)
        )
        return ("bakes_length", "") if literal else ("pointwise", "")
