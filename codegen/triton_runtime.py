"""The Triton runtime: covered regions run as generated kernels, everything else as torch.

Needs a CUDA device; what it compiles also runs on the CPU in triton's interpreter, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from paretorch.codegen.kernel import Kernel, Region
from paretorch.codegen.regions import candidate_regions, is_schedulable
from paretorch.codegen.triton_text import render
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable


class TritonRuntime:
    """Generated kernels for the regions that templates cover; vendor products and the rest by torch."""

    name = "triton"

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'paretorch[triton]'"
        return None if torch.cuda.is_available() else "there is no CUDA device here"

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        module = with_kernels(graph)[0]

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(module(*inputs))

        return execute


def chosen_regions(graph: Graph) -> list[Region]:
    """Regions that share no node and can run one after another: those around norms first, then chains of what is left."""
    chosen: list[Region] = []

    def take(regions: Sequence[Region]) -> None:
        for region in regions:
            taken = {node for other in chosen for node in other.nodes}
            if taken.isdisjoint(region.nodes) and is_schedulable(graph, [*chosen, region]):
                chosen.append(region)

    take([region for region in candidate_regions(graph) if region.template != "elementwise"])
    spoken_for = {node for region in chosen for node in region.nodes}
    take([region for region in candidate_regions(graph, spoken_for) if region.template == "elementwise"])
    return chosen


def with_kernels(graph: Graph, regions: Sequence[Region] | None = None) -> tuple[fx.GraphModule, list[Kernel]]:
    """The graph as a module in which these regions (the chosen ones if None) are calls of their kernels. Raises LoweringError."""
    regions = chosen_regions(graph) if regions is None else regions
    if not is_schedulable(graph, regions):
        raise LoweringError(f"these regions need values of each other: {', '.join(map(str, regions))}; leave one out")
    kernels = [render(region, place) for place, region in enumerate(regions)]
    home = {node: place for place, region in enumerate(regions) for node in region.nodes}
    plain, copies = fx.Graph(), dict[Node, Node]()

    def needs(node: Node) -> Sequence[Node]:
        return regions[home[node]].reads if node in home else node.all_input_nodes

    for node in graph.nodes:
        pending = [] if node in home else [node]  # a region is called when its first value is needed
        while pending:
            missing = [needed for needed in needs(pending[-1]) if needed not in copies]
            pending += missing[:1]
            if not missing and (current := pending.pop()) not in copies:
                place = home.get(current)
                copies |= _copied(plain, current, copies) if place is None else _called(plain, regions[place], kernels[place], copies)
    return fx.GraphModule(graph.module(), plain, class_name="ParetorchKernels"), kernels


def _copied(plain: fx.Graph, node: Node, copies: dict[Node, Node]) -> dict[Node, Node]:
    copy = plain.node_copy(node, lambda n: copies[n])
    copy.meta = {}
    if node.target is torch.ops.aten.view.default:  # kernels write rows one after another, where torch may have kept a transposed layout
        copy.target = torch.ops.aten.reshape.default
    return {node: copy}


def _called(plain: fx.Graph, region: Region, kernel: Kernel, copies: dict[Node, Node]) -> dict[Node, Node]:
    """Add the call of a region's kernel; returns the new nodes by the values that they stand for."""
    call = plain.call_function(kernel.launch, tuple(copies[read] for read in region.reads))
    if len(region.writes) == 1:
        return {region.writes[0]: call}
    return {write: plain.call_function(getitem, (call, place)) for place, write in enumerate(region.writes)}
