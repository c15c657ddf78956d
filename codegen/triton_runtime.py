"""The Triton runtime: planned regions run as generated kernels, everything else as torch.

Needs a CUDA device; what it compiles also runs on the CPU in triton's interpreter, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from paretorch.codegen.kernel import Kernel, Region
from paretorch.codegen.regions import can_compute, covers, is_schedulable, region_of
from paretorch.codegen.triton_text import render
from paretorch.codegen.tuning import Tuner
from paretorch.codegen.whole_op import template_name
from paretorch.codegen.whole_ops import WHOLE_OPS
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.protocols import Executable
from paretorch.ir.types import size_of

Priced = tuple[Region, tuple[float, str] | None]  # predicted: seconds of one launch, and on what device


def each_alone(graph: Graph) -> list[Priced]:
    """A region for every node that a kernel can compute: what is run where nothing was planned."""
    regions = [region_of([node]) for node in graph.calls if can_compute(node) and not _is_plain_product(node)]
    return [(region, None) for region in regions if not isinstance(covers(region), str)]


def _is_plain_product(node: Node) -> bool:
    """Whether torch has a kernel for just this, and there is a template for the sake of what goes along with it."""
    template = WHOLE_OPS.get(template_name(node) or "")
    return template is not None and template.joins is not None and not template.goes_first(node)


class TritonRuntime:
    """Generated kernels for the regions of a plan; vendor products and the rest by torch.

    plan: chooses the regions of a graph; tuner: the schedules of their kernels, None for the templates' defaults.
    """

    name = "triton"

    def __init__(self, plan: Callable[[Graph], Sequence[Priced]] = each_alone, tuner: Tuner | None = None) -> None:
        self.plan, self.tuner = plan, tuner

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed: pip install 'paretorch[triton]'"
        return None if torch.cuda.is_available() else "there is no CUDA device here"

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        module = with_kernels(graph, self.plan(graph), self.tuner)[0]

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(module(*inputs))

        return execute


def kernels_of(priced: Sequence[Priced], tuner: Tuner | None = None) -> tuple[list[Kernel], list[int]]:
    """(kernels, for each region the place of its kernel): regions that differ in names only share one. tuner: chooses their schedules, None for the
    templates' defaults. Raises LoweringError."""
    places: dict[Any, int] = {}
    distinct: list[Priced] = []
    serving = []
    for region, predicted in priced:
        key = signature(region)
        if key not in places:
            places[key] = len(distinct)
            distinct.append((region, predicted))
        serving.append(places[key])
    schedules = tuner.schedules([region for region, _ in distinct]) if tuner is not None else [None] * len(distinct)
    kernels = [
        replace(render(region, place, schedule, predicted), uses=serving.count(place))
        for place, ((region, predicted), schedule) in enumerate(zip(distinct, schedules, strict=True))
    ]
    return kernels, serving


def signature(region: Region) -> Any:
    """Equal for regions that compute the same of other values: ops, attributes, types, layouts and wiring."""
    number = {node: place for place, node in enumerate((*region.reads, *region.nodes))}

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return ("value", number[value]) if value in number else ("size", str(size_of(value.meta["val"])))
        if isinstance(value, (list, tuple)):
            return tuple(plain(part) for part in value)
        return repr(value)

    def type_(node: Node) -> Any:
        value = node.meta["val"]
        return (str(value.dtype), shape_of(node), tuple(map(str, value.stride()))) if isinstance(value, Tensor) else ""

    rows = tuple(
        (str(node.target), plain(node.args), tuple((key, plain(value)) for key, value in sorted(node.kwargs.items())), type_(node))
        for node in region.nodes
    )
    return region.template, tuple(map(type_, region.reads)), rows, tuple(number[node] for node in region.writes)


def with_kernels(graph: Graph, priced: Sequence[Priced], tuner: Tuner | None = None) -> tuple[fx.GraphModule, list[Kernel]]:
    """The graph as a module in which these regions are calls of their kernels. tuner: as for `kernels_of`. Raises LoweringError."""
    regions = [region for region, _ in priced]
    if not is_schedulable(graph, regions):
        raise LoweringError(f"these regions need values of each other: {', '.join(map(str, regions))}; leave one out")
    kernels, serving = kernels_of(priced, tuner)
    home = {node: place for place, region in enumerate(regions) for node in region.writes}
    plain, copies = fx.Graph(), dict[Node, Node]()

    def needs(node: Node) -> Sequence[Node]:
        return regions[home[node]].reads if node in home else node.all_input_nodes

    for node in [*graph.inputs, graph.output_node]:
        pending = [node]
        while pending:
            missing = [needed for needed in needs(pending[-1]) if needed not in copies]
            pending += missing[:1]
            if not missing and (current := pending.pop()) not in copies:
                place = home.get(current)
                if place is None:
                    copies |= _copied(plain, current, copies)
                else:
                    copies |= _called(plain, regions[place], kernels[serving[place]], copies)
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
