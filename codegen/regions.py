"""Candidate regions: sets of nodes that one kernel can compute. The compiler's planner chooses among them by price.

covers(region)              -> the template that takes it, or the reason why none does
candidate_regions(graph)    -> maximal regions around each norm, each norm alone, and maximal chains of elementwise ops; they may overlap
resources(kernel, arch)     -> registers, spills and shared bytes of the compiled kernel

A region is convex: nothing outside of it lies on a path between two of its nodes, so it can run as one call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter

from torch.fx import Node

from paretorch.codegen.expressions import TRITON_TYPES, dtype_of, not_expressible
from paretorch.codegen.kernel import Binary, Kernel, KernelTemplate, Region
from paretorch.codegen.templates import TEMPLATES
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import is_op

MOST_READS = 16  # operands of one kernel


def covers(region: Region) -> KernelTemplate | str:
    """The template that takes this region, or a sentence."""
    norms = [node for node in region.nodes if is_op(node, "layer_norm", "rms_norm")]
    if len(norms) > 1:
        return f"{norms[1].name} is a second norm; a kernel takes one"
    for node in region.nodes:
        reason = None if node in norms else not_expressible(node)
        if reason is not None:
            return reason
    odd = next((node for node in region.reads if dtype_of(node) not in TRITON_TYPES), None)
    if odd is not None:
        return f"{odd.name} is {odd.meta.get('val')}; the templates read tensors of real numbers"
    if not region.reads or len(region.reads) > MOST_READS:
        return f"it reads {len(region.reads)} values; the templates take 1 to {MOST_READS}"
    if not region.writes:
        return "nobody uses its values"
    template = TEMPLATES[region.template]
    return template.legal(region) or template


def resources(kernel: Kernel, arch: str) -> Binary:
    """What the compiled kernel takes on an architecture; needs no GPU."""
    return kernel.compile(arch)


def region_of(template: str, nodes: Sequence[Node]) -> Region:
    """The region of these nodes, given in graph order."""
    reads = dict.fromkeys(argument for node in nodes for argument in node.all_input_nodes if argument not in nodes)
    writes = [node for node in nodes if any(user not in nodes for user in node.users)]
    return Region(template, tuple(nodes), tuple(reads), tuple(writes))


def candidate_regions(graph: Graph, without: Collection[Node] = ()) -> list[Region]:
    """Covered regions in graph order, the larger first where two start together; `without`: nodes that are spoken for."""
    reach = _Reach(graph)
    free = [node for node in graph.calls if node not in set(without)]
    plain = {node for node in free if not_expressible(node) is None}
    found: list[Region] = []
    for norm in (node for node in free if is_op(node, "layer_norm", "rms_norm")):
        grown = _around(norm, plain, reach)
        template = next(name for name in ("layer_norm", "rms_norm") if is_op(norm, name))
        found += [region_of(template, reach.ordered(nodes)) for nodes in ([grown] if len(grown) == 1 else [grown, {norm}])]
    found += [region_of("elementwise", reach.ordered(nodes)) for nodes in _chains(free, plain, reach)]
    legal = [region for region in found if isinstance(covers(region), KernelTemplate)]
    return sorted(legal, key=lambda region: (reach.place[region.nodes[0]], -len(region.nodes)))


def is_schedulable(graph: Graph, regions: Sequence[Region]) -> bool:
    """Whether these regions can run one after another: convex ones may still need values of each other, each of one part of the other."""
    home = {node: -1 - number for number, region in enumerate(regions) for node in region.nodes}
    needs: dict[Node | int, set[Node | int]] = {}
    for node in graph.nodes:
        unit = home.get(node, node)
        needs.setdefault(unit, set()).update(home.get(argument, argument) for argument in node.all_input_nodes)
    ready = TopologicalSorter({unit: needed - {unit} for unit, needed in needs.items()})
    try:
        ready.prepare()
    except CycleError:
        return False
    return True


class _Reach:
    """Which nodes depend on which, as bit sets over places in the graph."""

    def __init__(self, graph: Graph) -> None:
        self.place = {node: number for number, node in enumerate(graph.nodes)}
        self.before: dict[Node, int] = {}
        for node in graph.nodes:
            bits = 0
            for argument in node.all_input_nodes:
                bits |= self.before[argument] | 1 << self.place[argument]
            self.before[node] = bits

    def is_convex(self, nodes: Collection[Node]) -> bool:
        """No value that the nodes read from outside depends on one of them."""
        mine = sum(1 << self.place[node] for node in nodes)
        return not any(self.before[argument] & mine for node in nodes for argument in node.all_input_nodes if argument not in nodes)

    def ordered(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.place.__getitem__)


def _around(norm: Node, plain: Collection[Node], reach: _Reach) -> set[Node]:
    """The norm, the chain that alone uses it, what is added up right before it, and all that is computed for these alone."""
    shape, nodes = shape_of(norm), {norm}

    def joins(node: Node) -> bool:
        return node not in nodes and node in plain and shape_of(node) == shape and reach.is_convex({*nodes, node})

    last = norm
    while len(last.users) == 1 and joins(user := next(iter(last.users))):
        nodes.add(user)
        last = user
    source = norm.args[0]
    if isinstance(source, Node) and joins(source):
        nodes.add(source)  # a residual sum is written too, where others use it
    queue = [argument for node in nodes for argument in node.all_input_nodes]
    while queue:
        node = queue.pop()
        if all(user in nodes for user in node.users) and joins(node):
            nodes.add(node)
            queue += node.all_input_nodes
    return nodes


def _chains(free: Iterable[Node], plain: Collection[Node], reach: _Reach) -> list[set[Node]]:
    """Maximal connected convex sets of elementwise nodes of one shape, two or more nodes each."""
    of: dict[Node, set[Node]] = {}
    for node in free:
        if node not in plain:
            continue
        chain = {node}
        for argument in node.all_input_nodes:
            if argument in of and shape_of(argument) == shape_of(node) and argument not in chain and reach.is_convex(chain | of[argument]):
                chain |= of[argument]
        for member in chain:
            of[member] = chain
    unique = {id(chain): chain for chain in of.values()}
    return [chain for chain in unique.values() if len(chain) > 1]
