"""Prices: predicted seconds of nodes and graphs on one device, per runtime.

seconds = max(flops / rate, bytes / bandwidth) + launch, for each node, with rates and bandwidths from the runtime's curves for that kind
of op, dtype and shape. To that comes what a single node does not show: pointwise ops that a runtime fuses cost a share of their pass, views
are free where the runtime has strides (the reshape of a permuted value is then a copy), and weights that no cache holds are read from memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.cost_model.curves import Calibration, Rates
from paretorch.cost_model.definition import calls_of, is_defined, key_of
from paretorch.cost_model.device_rows import Device
from paretorch.cost_model.memory import copies, output_bytes, peak_memory, weight_bytes
from paretorch.cost_model.work import Work, kind_of, other_sizes, work_of
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import op_of
from paretorch.ir.protocols import Cost

NOTHING = Cost(0.0)
COMPUTES_CONSTANTS = ("eager",)  # runtimes that compute what depends on no input again in each call
CACHED_SHARE = 0.5  # weights begin to leave a cache when they fill this share of it, since activations need room too


@dataclass(frozen=True)
class _Context:
    """What the price of a node depends on beside its types. cold, warm: shares of weights that come from memory, or from the shared cache at best."""

    runtime: str
    cold: float
    warm: float


class Prices:
    """Costs of nodes and graphs; a KernelCost. Equal nodes are priced once."""

    def __init__(self, calibration: Calibration, device: Device) -> None:
        self.calibration, self.device = calibration, device
        self._known: dict[Any, Cost] = {}

    def rates(self, runtime: str, dtype: str) -> Rates:
        """The rates for a dtype; a dtype that was not measured is run as f32. Raises TargetError for a runtime without rates."""
        found = self.calibration.rates.get((runtime, dtype)) or self.calibration.rates.get((runtime, "f32"))
        if found is None:
            known = ", ".join(sorted({name for name, _ in self.calibration.rates}))
            raise TargetError(f"no prices for the runtime {runtime!r} on {self.calibration.name}; calibrated: {known or 'none'}")
        return found

    def graph_cost(self, graph: Graph, runtime: str, weights: int | None = None) -> Cost:
        """Predicted cost of one call of the whole graph, at the example's sizes. Raises TargetError for a runtime without rates.

        weights: bytes of the model that this graph is a part of, which say what of them caches hold; None for the graph's own.
        """
        context = self._context(runtime, weight_bytes(graph) if weights is None else weights)
        total = self.call_cost(graph, runtime)
        for node in graph.calls:
            total = total + self._cost(node, context)
        return total

    def node_cost(self, node: Node, runtime: str) -> Cost:
        """Predicted cost of one node where it stands in its graph, with weights that are in a cache."""
        return self._cost(node, _Context(runtime, 0.0, 0.0))

    def kernel_cost(self, bytes_moved: float, flops: float, dtype: str, runtime: str, launches: int = 1) -> Cost:
        """Predicted cost of one kernel that streams so many bytes: what a region of light ops costs as one. Raises TargetError."""
        rates = self.rates(runtime, dtype)
        work = Work(("elementwise",), (max(bytes_moved, 1.0),), flops, bytes_moved, dtype)
        return Cost(_seconds(work, rates) * rates.scale + launches * rates.launch_s, flops, bytes_moved, float(launches))

    def op_cost(self, node: Node, bytes_moved: float, flops: float, launches: int, runtime: str) -> Cost:
        """Predicted cost of this node by a kernel that does so much, at the rates of its op. Raises TargetError."""
        work = replace(work_of(node), flops=flops, bytes_moved=bytes_moved)
        rates = self.rates(runtime, work.dtype)
        seconds = _seconds(work, rates) * _scale(node, work, rates) + launches * rates.launch_s
        return Cost(seconds, flops, bytes_moved, float(launches))

    def call_cost(self, graph: Graph, runtime: str) -> Cost:
        """What one call costs beside its nodes. Raises TargetError."""
        rates = self.rates(runtime, "f32")
        return Cost(rates.call_s + rates.output_s_per_byte * output_bytes(graph))

    def peak_memory(self, graph: Graph) -> int:
        """Bytes of weights and of values that live at the same time, at the example's sizes."""
        return peak_memory(graph)

    def _context(self, runtime: str, nbytes: float) -> _Context:
        return _Context(runtime, _missing(nbytes, self.calibration.cache_bytes), _missing(nbytes, self.calibration.near_cache_bytes))

    def _cost(self, node: Node, context: _Context) -> Cost:
        if kind_of(node) == "scalar":
            return NOTHING
        fused = fusions(node)
        key = (_signature(node), context, fused, other_sizes())
        if key not in self._known:
            self._known[key] = self._price(node, context, fused)
        return self._known[key]

    def _price(self, node: Node, context: _Context, fused: tuple[str, ...]) -> Cost:
        if is_defined(node) and not self._has_curve(node, context.runtime):
            key = (key_of(node), context)
            if key not in self._known:
                calls = [call for call, varies in calls_of(node) if varies or context.runtime in COMPUTES_CONSTANTS]
                self._known[key] = sum((self._cost(call, context) for call in calls), NOTHING)
            return self._known[key]
        work = work_of(node)
        rates = self.rates(context.runtime, work.dtype)
        if kind_of(node) == "view" and rates.strided:
            if not copies(node):
                return Cost(rates.view_s)
            work = Work(("clone", "copy"), work.at, 0.0, work.bytes_moved, work.dtype)
        share = min((getattr(rates, name) for name in fused), default=1.0)
        cold = context.cold * rates.cold_s_per_byte * work.constant_bytes
        if work.constant_bytes <= self.calibration.near_cache_bytes:  # the curves of larger weights were measured without that cache
            cold += context.warm * rates.warm_s_per_byte * work.constant_bytes
        scale, op = _scale(node, work, rates), op_of(node)
        launches = op.launches(node) if op is not None else 1
        seconds = (_seconds(work, rates) * scale + launches * rates.launch_s) * share + cold
        return Cost(seconds, work.flops, work.bytes_moved * share, launches * share)

    def _has_curve(self, node: Node, runtime: str) -> bool:
        """Whether the op of this call was measured by itself there."""
        op = op_of(node)
        return op is not None and op.name in self.rates(runtime, "f32").curves


def _scale(node: Node, work: Work, rates: Rates) -> float:
    """How much longer a node of this kind takes among others than alone."""
    if kind_of(node) != "convolution":
        return rates.scale
    return rates.separated if work.curves[0] in ("convolution.pointwise", "convolution.depthwise") else rates.convolved


def _missing(nbytes: float, cache_bytes: float) -> float:
    """The share of weights that has left a cache when it is needed again: they are read in turn, so it rises steeply."""
    begin = CACHED_SHARE * cache_bytes
    return min(max((nbytes - begin) / begin, 0.0), 1.0) if begin < float("inf") else 0.0


def _seconds(work: Work, rates: Rates) -> float:
    """max(flops / rate, bytes / bandwidth) of one kernel, without its launch."""
    passes = rates.curve(("elementwise",))
    assert passes is not None  # rates without it are not made
    if work.is_rated_by_flops:
        curve = rates.curve(work.curves)
        moving = work.bytes_moved / passes((max(work.bytes_moved, 1.0),))
        return max(work.flops / curve(work.at) + rates.fixed(work.curves), moving) if curve is not None else moving
    curve = rates.curve(work.curves) or passes
    moving = work.bytes_moved / curve((max(work.bytes_moved, 1.0),))
    return max(moving, work.flops / rates.flops_per_s)


def fusions(node: Node) -> tuple[str, ...]:
    """Names of the shares of `Rates` that may apply to a node where it stands."""
    if kind_of(node) == "view":
        return ("beside_attention",) if _is_beside_attention(node) else ()
    if not _is_light(node):
        return ()
    makers = _makers(node)
    sources = {_source_kind(maker) for maker in makers if len(maker.users) == 1}
    if "convolution" in sources:
        return ("filtered",)
    found = ("epilogue",) if "matrix" in sources else ()
    if any(_is_light(maker) for maker in makers):
        found = (*found, "chained")
    if any(kind_of(user) in ("row", "reduce") for user in node.users):
        found = (*found, "into_row")
    return found


def _is_beside_attention(node: Node) -> bool:
    """Whether only views stand between this one and attention."""
    if any(kind_of(maker) == "attention" for maker in _makers(node)):
        return True
    users = list(node.users)
    while users:
        user = users.pop()
        if kind_of(user) == "attention":
            return True
        if kind_of(user) in ("view", "scalar"):
            users += user.users
    return False


def _is_light(node: Node) -> bool:
    """Whether it does little for each element: a pointwise op, or a norm whose statistics are known."""
    op = op_of(node)
    return op is not None and (op.kind == "elementwise" or op.name == "batch_norm")


def _makers(node: Node) -> list[Node]:
    """The calls that computed the operands, looking through views."""
    found = []
    for maker in node.all_input_nodes:
        while kind_of(maker) in ("view", "scalar") and maker.args and isinstance(maker.args[0], Node):
            maker = maker.args[0]
        if maker.op == "call_function":
            found.append(maker)
    return found


def _source_kind(node: Node) -> str:
    """The kind of the op whose result this is, or from whose result light ops alone computed it."""
    while _is_light(node):
        alone = [maker for maker in _makers(node) if len(maker.users) == 1]
        if not alone:
            break
        node = alone[0]
    return kind_of(node)


def _signature(node: Node) -> Any:
    """Equal for nodes of the same op, attributes and operand types."""
    return str(node.target), _plain(node.args), _plain(tuple(sorted(node.kwargs.items()))), _plain(node.meta.get("val"))


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.op == "get_attr", _plain(value.meta.get("val"))
    if isinstance(value, Tensor):
        return value.dtype, tuple(map(str, value.shape)), tuple(map(str, value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    return value if isinstance(value, (int, float, str, bool, type(None), torch.dtype)) else str(value)
