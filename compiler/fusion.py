"""Fusion planning: which nodes run as one generated kernel, chosen by price.

At first every node that a kernel can compute stands alone. Of all pairs that read each other's values, or the same one, the two whose union saves
the most predicted seconds are joined first: bytes that no longer travel and a launch, less what is computed more often than before, since a value that
is broadcast or seen through several views is computed for each element that needs it. It ends where nothing saves any more. A union must be one
kernel that a template takes, with values in registers, and must leave an order in which everything can run. A value with other users is written.

An op with a template of its own is a region by itself, where torch has no kernel for just this and ours is predicted to take no longer. A product
joins what is elementwise before and after it, where that kernel is predicted to take less than the vendor's product and theirs. Where its programs
are too few for a chip, a kernel that divides what each of them adds up is priced too, and the cheaper one is taken. The plan prints both prices, and
those of products that stand apart from what they could have been joined with.
What no kernel takes, a lone elementwise op included, runs as torch; views cost nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Node

from paretorch.codegen.coordinates import source_of
from paretorch.codegen.expressions import dtype_of, row_text
from paretorch.codegen.kernel import Region
from paretorch.codegen.regions import can_compute, emitted, forms_of, region_of
from paretorch.codegen.triton_runtime import Priced, signature
from paretorch.codegen.whole_op import Effort, own_node, template_name
from paretorch.codegen.whole_ops import WHOLE_OPS, not_taken
from paretorch.cost_model.price import Prices
from paretorch.cost_model.work import number, other_sizes
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import op_of
from paretorch.ir.protocols import Cost
from paretorch.rewrites.normalize.count_keys import count_keys
from paretorch.rewrites.normalize.count_rows import count_rows
from paretorch.rewrites.normalize.read_pages import read_pages

RUNTIME = "triton"
NOTHING = Cost(0.0)


@dataclass(frozen=True)
class Fused:
    """A chosen region: its cost as one kernel, what its nodes cost apart, and what other kernels for it would cost."""

    region: Region
    cost: Cost
    apart: Cost
    others: tuple[tuple[str, Cost], ...] = ()

    def __str__(self) -> str:
        saved = f"saves {_time(self.apart.seconds - self.cost.seconds)}, {self.apart.bytes_moved - self.cost.bytes_moved:,.0f} bytes"
        launches = self.apart.launches - self.cost.launches
        return f"{self.region}: {_time(self.cost.seconds)}{_as(self.others)}, {saved}, {launches:.0f} launches"


@dataclass(frozen=True)
class Left:
    """What could have been one kernel with a product in it, and costs less as what it is now. count: how many such there are."""

    region: Region
    cost: Cost
    apart: float
    others: tuple[tuple[str, Cost], ...]
    count: int

    def __str__(self) -> str:
        times = f"{self.count} times " if self.count > 1 else ""
        return f"not joined: {times}{self.region}: {_time(self.cost.seconds)}{_as(self.others)}, {_time(self.apart)} apart"


@dataclass(frozen=True)
class FusionPlan:
    """regions: in graph order; rest: cost of what runs as torch, left: how many nodes that is; unjoined: what a price speaks against."""

    device: str
    regions: tuple[Fused, ...]
    rest: Cost
    left: int
    unjoined: tuple[Left, ...] = ()

    @property
    def cost(self) -> Cost:
        return sum((fused.cost for fused in self.regions), self.rest)

    @property
    def priced(self) -> list[Priced]:
        """The regions with their predicted seconds, for the runtime."""
        return [(fused.region, (fused.cost.seconds, self.device)) for fused in self.regions]

    def __str__(self) -> str:
        apart = sum((fused.apart for fused in self.regions), self.rest)
        lines = [
            f"fusion plan for {self.device}: {len(self.regions)} kernels, {self.left} nodes as torch; "
            f"predicted {_time(self.cost.seconds)}, apart {_time(apart.seconds)}"
        ]
        return "\n".join([*lines, *(f"  {line}" for line in (*self.regions, *self.unjoined))])


def _named(forms: Iterable[tuple[Region, Cost]]) -> tuple[tuple[str, Cost], ...]:
    return tuple((region.template, cost) for region, cost in forms)


def _as(others: Iterable[tuple[str, Cost]]) -> str:
    """The prices of a region's other kernels."""
    return "".join(f" (as {template} {_time(cost.seconds)})" for template, cost in others)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


class Fusion:
    """Plans for one device. Regions that are alike are priced once."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self._known: dict[Any, Cost | None] = {}
        self._plans: WeakKeyDictionary[Graph, dict[Any, FusionPlan]] = WeakKeyDictionary()
        self._forms: WeakKeyDictionary[Graph, dict[Any, Graph | None]] = WeakKeyDictionary()

    def form(self, graph: Graph) -> Graph:
        """The graph as kernels read it: masks that count keys, and packed rows, are numbers; keys gathered from pages are read through their table."""
        kept, key = self._forms.setdefault(graph, {}), (graph.edits, len(graph.fx.nodes))
        if key not in kept:
            found = read_pages(count_rows(count_keys(graph)))
            kept[key] = found if found is not graph else None  # which would keep itself
        return kept[key] or graph

    def plan(self, graph: Graph) -> FusionPlan:
        """The regions of this graph at the example's sizes. Raises TargetError for a device without rates."""
        kept, key = self._plans.setdefault(graph, {}), (graph.edits, len(graph.fx.nodes), other_sizes())
        if key not in kept:
            kept[key] = self._plan(graph)
        return kept[key]

    def _plan(self, graph: Graph) -> FusionPlan:
        merging = _Merging(graph, self.cost, self._alone)
        chosen = [nodes for nodes in merging.run() if len(nodes) > 1 or row_text(nodes[0]) is not None or self._goes_first(nodes[0])]
        fused = []
        for nodes in chosen:
            (region, cost), *others = self.forms(nodes)  # what no template takes stands alone
            apart = sum((self._apart(node) for node in nodes), NOTHING)
            fused.append(Fused(region, cost, apart, _named(others)))
        inside = {node for one in fused for node in one.region.nodes}
        left = [node for node in graph.calls if node not in inside]
        rest = sum((self.prices.node_cost(node, RUNTIME) for node in left), self.prices.call_cost(graph, RUNTIME))
        counted = sum(1 for node in left if (op := op_of(node)) is None or op.kind not in ("view", "scalar"))
        return FusionPlan(self.prices.device.name, tuple(fused), rest, counted, self._unjoined(merging))

    def _unjoined(self, merging: _Merging) -> tuple[Left, ...]:
        """Those that are alike are one."""
        found: dict[Any, Left] = {}
        for nodes, apart in merging.unjoined():
            (region, cost), *others = self.forms(nodes)
            if region.template in WHOLE_OPS:
                known = found.get(signature(region))
                found[signature(region)] = replace(known, count=known.count + 1) if known else Left(region, cost, apart, _named(others), 1)
        return tuple(found.values())

    def cost(self, nodes: Sequence[Node]) -> Cost | None:
        """Of these nodes as one kernel; None if no template takes them."""
        return next((cost for _, cost in self.forms(nodes)), None)

    def forms(self, nodes: Sequence[Node]) -> list[tuple[Region, Cost]]:
        """The kernels that compute these nodes, the cheapest first; none if no template takes them."""
        found = []
        for region in forms_of(region_of(nodes)):
            key = (signature(region), other_sizes())
            if key not in self._known:
                self._known[key] = self._cost(region)
            if (cost := self._known[key]) is not None:
                found.append((region, cost))
        return sorted(found, key=lambda form: form[1].seconds)

    def _alone(self, node: Node, cost: Cost) -> float:
        """Seconds of a node that a kernel could compute, if nothing joins it: by torch, where that is what runs."""
        if template_name(node) is None or self._goes_first(node):
            return cost.seconds
        return self.prices.node_cost(node, RUNTIME).seconds

    def _goes_first(self, node: Node) -> bool:
        """Whether a kernel of its own stands in for torch's."""
        name, cost = template_name(node), self.cost([node])
        if name is None or cost is None or not WHOLE_OPS[name].goes_first(node):
            return False
        return cost.seconds <= self.prices.node_cost(node, RUNTIME).seconds

    def _apart(self, node: Node) -> Cost:
        if template_name(node) is not None:
            return self.prices.node_cost(node, RUNTIME)
        return self.cost([node]) or NOTHING

    def _whole(self, region: Region) -> Cost:
        node, effort = own_node(region), WHOLE_OPS[region.template].effort(region)
        flops, moved = number(effort.flops, node), number(effort.bytes_moved, node)
        if effort.is_rated_alike:
            light, filled = self.prices.kernel_cost(0.0, number(effort.light_flops, node), "f32", RUNTIME, 0), self._filled(effort, node)
            own = self.prices.op_cost(node, moved / filled, flops / effort.rate / filled, effort.launches, RUNTIME)
            return replace(own, flops=flops, bytes_moved=moved) + light
        return self.prices.kernel_cost(moved, flops, "f32", RUNTIME, effort.launches)

    def _filled(self, effort: Effort, node: Node) -> float:
        """The share of the device's units that a kernel's programs keep busy."""
        if effort.programs is None:
            return 1.0
        return min(number(effort.programs, node) / (self.prices.device.units * effort.of_a_unit), 1.0)

    def _cost(self, region: Region) -> Cost | None:
        if region.template in WHOLE_OPS:
            return self._whole(region) if not_taken(region) is None else None
        try:
            emitter = emitted(region)
        except LoweringError:
            return None
        first = region.nodes[0]
        elements = prod(number(size, first) for size in region.shape)
        flops = 0.0
        for node, times in emitter.evaluations.items():
            op = op_of(node)
            if op is None or node in emitter.layouts:
                continue
            own = max(prod(number(size, node) for size in node.meta["val"].shape), 1.0)
            work = number(op.flops(node), node)
            flops += work * times * (max(elements / own, 1.0) if row_text(node) is None else 1.0)
        passes = 1 + sum(bool(line.reduction) for line in emitter.lines) if region.template == "long_row" else 1
        moved = sum(map(_bytes, (*region.reads, *region.writes)))
        return self.prices.kernel_cost(moved, flops * passes, dtype_of(region.writes[0]), RUNTIME)


def _bytes(node: Node) -> float:
    """Of the value's different elements: an expanded axis is one of length one."""
    value = node.meta["val"]
    sizes = [
        number(size, node)
        for size, stride in zip(value.shape, value.stride(), strict=True)
        if not (isinstance(stride, int) and stride == 0)
    ]
    return float(prod(sizes) * value.dtype.itemsize)


@dataclass
class _Merging:
    """Clusters of nodes, joined pair by pair. Views are no nodes here: who looks at a value through them uses the value."""

    graph: Graph
    price: Callable[[Sequence[Node]], Cost | None]
    alone: Callable[[Node, Cost], float]
    clusters: dict[int, list[Node]] = field(default_factory=dict)
    home: dict[Node, int] = field(default_factory=dict)
    before: dict[int, set[int]] = field(default_factory=dict)
    after: dict[int, set[int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)  # of clusters that are kernels
    heap: list[tuple[float, int, int]] = field(default_factory=list)
    dear: list[tuple[int, int]] = field(default_factory=list)  # pairs that one kernel could compute, and that it saves nothing

    def run(self) -> list[list[Node]]:
        """The nodes of each kernel, in graph order."""
        self._start()
        while self.heap:
            _, first, second = heapq.heappop(self.heap)
            if first in self.clusters and second in self.clusters and not self._has_detour(first, second):
                self._join(first, second)
        return [self.clusters[number] for number in sorted(self.seconds, key=lambda number: self.clusters[number][0])]

    def _start(self) -> None:
        nodes = [node for node in self.graph.nodes if source_of(node) is None]
        for place, node in enumerate(nodes):
            self.clusters[place], self.home[node], self.after[place] = [node], place, set()
            roots = {self.home[root] for operand in node.all_input_nodes if (root := _root(operand)) in self.home}
            self.before[place] = roots
            for source in roots:
                self.after[source].add(place)
            cost = self.price([node]) if can_compute(node) else None
            if cost is not None:
                self.seconds[place] = self.alone(node, cost)
        for place in list(self.seconds):
            for other in self._near(place):
                if other > place:
                    self._offer(place, other)

    def _near(self, place: int) -> list[int]:
        """Kernels that this one reads, that read it, or that come next among those that read the same value."""
        found = dict.fromkeys(sorted(self.before[place] | self.after[place]))
        for source in sorted(self.before[place]):
            readers = [reader for reader in sorted(self.after[source]) if reader in self.seconds and not self._is_whole(reader)]
            at = readers.index(place) if place in readers else -1
            found |= dict.fromkeys(readers[max(at - 1, 0) : at + 2] if at >= 0 else ())
        return [other for other in found if other in self.seconds and other != place]

    def _is_whole(self, place: int) -> bool:
        """Whether an op with a template of its own is there, which shares no kernel with one that merely reads the same."""
        return any(template_name(node) is not None for node in self.clusters[place])

    def _offer(self, first: int, second: int) -> None:
        cost = self.price(_ordered((*self.clusters[first], *self.clusters[second])))
        if cost is None:
            return
        saved = self.seconds[first] + self.seconds[second] - cost.seconds
        if saved > 0:
            heapq.heappush(self.heap, (-saved, first, second))
        else:
            self.dear.append((first, second))

    def unjoined(self) -> list[tuple[list[Node], float]]:
        """(nodes, seconds apart) of those pairs that are left so at the end."""
        left = [pair for pair in dict.fromkeys(self.dear) if self.clusters.keys() >= set(pair) and not self._has_detour(*pair)]
        return [(_ordered((*self.clusters[a], *self.clusters[b])), self.seconds[a] + self.seconds[b]) for a, b in left]

    def _has_detour(self, first: int, second: int) -> bool:
        """Whether a way leads from one to the other through a third, which could then run neither before nor after the union."""
        return any(self._reaches(start, end, other) for start, end, other in ((first, second, second), (second, first, first)))

    def _reaches(self, start: int, end: int, direct: int) -> bool:
        queue = [number for number in self.after[start] if number != direct]
        seen = set(queue)
        while queue:
            number = queue.pop()
            if number == end:
                return True
            new = self.after[number] - seen
            seen |= new
            queue += new
        return False

    def _join(self, first: int, second: int) -> None:
        number = len(self.clusters) + len(self.home) + max(self.clusters)
        self.clusters[number] = _ordered((*self.clusters.pop(first), *self.clusters.pop(second)))
        both = {first, second}
        self.before[number] = (self.before.pop(first) | self.before.pop(second)) - both
        self.after[number] = (self.after.pop(first) | self.after.pop(second)) - both
        for other in self.before[number]:
            self.after[other] = (self.after[other] - both) | {number}
        for other in self.after[number]:
            self.before[other] = (self.before[other] - both) | {number}
        del self.seconds[first], self.seconds[second]
        cost = self.price(self.clusters[number])
        assert cost is not None  # it was offered
        self.seconds[number] = cost.seconds
        for other in self._near(number):
            self._offer(min(number, other), max(number, other))


def _root(node: Node) -> Node:
    """The value that a view of views looks at."""
    while (source := source_of(node)) is not None:
        node = source
    return node


def _ordered(nodes: Iterable[Node]) -> list[Node]:
    return sorted(nodes)
