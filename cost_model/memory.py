"""Peak memory of one call, by liveness: weights once, every value from the node that makes it to its last use.

A view shares the memory of what it looks at. Inputs belong to the caller and stay; outputs stay to the end. Scratch space inside a kernel is not seen.
"""

from __future__ import annotations

from math import prod

from torch import Tensor
from torch.fx import Node

from paretorch.cost_model.work import kind_of, number, sizes, tensor_values
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op


def peak_memory(graph: Graph) -> int:
    """Bytes, at the example's sizes."""
    nodes = graph.nodes
    base = _bases(nodes)
    last = {base[argument]: place for place, node in enumerate(nodes) for argument in node.all_input_nodes if argument in base}
    live = sum(_bytes(node, node.meta["val"]) for node in graph.inputs if isinstance(node.meta.get("val"), Tensor))
    peak, ends = live, _ends(last)
    for place, node in enumerate(nodes):
        if node.op == "call_function" and base[node] is node:
            live += _own_bytes(node)
            peak = max(peak, live)
            if node not in last:  # made and not used
                live -= _own_bytes(node)
        live -= sum(_own_bytes(gone) for gone in ends.get(place, ()) if gone.op == "call_function")
    return int(peak + weight_bytes(graph))


def weight_bytes(graph: Graph) -> int:
    """Bytes of all constants, those that share one storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in graph.constants.values()}
    return sum(storages.values())


def output_bytes(graph: Graph) -> int:
    """Bytes of what the graph returns."""
    return sum(_own_bytes(value) for value in graph.outputs if isinstance(value, Node))


def _bases(nodes: list[Node]) -> dict[Node, Node]:
    """For every value the node whose memory it lies in."""
    base: dict[Node, Node] = {}
    for node in nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        shares = (
            source is not None and node.op == "call_function" and (is_op(node, "getitem") or (kind_of(node) == "view" and not copies(node)))
        )
        base[node] = base[source] if shares and source is not None else node
    return base


def _ends(last: dict[Node, int]) -> dict[int, list[Node]]:
    ends: dict[int, list[Node]] = {}
    for node, place in last.items():
        ends.setdefault(place, []).append(node)
    return ends


def _own_bytes(node: Node) -> int:
    return sum(_bytes(node, value) for value in tensor_values(node))


def _bytes(node: Node, value: Tensor) -> int:
    return prod(sizes(node, value)) * value.dtype.itemsize


def copies(node: Node) -> bool:
    """Whether a view cannot be had without a copy: a reshape of a value whose axes do not lie in order."""
    if not is_op(node, "view") or not isinstance(node.args[0], Node):
        return False
    source, result = node.args[0].meta["val"], node.meta["val"]
    if source.is_contiguous():
        return False
    strides = _strides(node.args[0], source)
    return not _is_viewable(sizes(node, source), strides, sizes(node, result))


def _strides(node: Node, value: Tensor) -> tuple[int, ...]:
    return tuple(stride if isinstance(stride, int) else int(number(stride, node)) for stride in value.stride())


def _is_viewable(shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether axes that lie in memory with these strides can be regrouped into the wanted shape: each group must be one run of memory."""
    runs: list[list[int]] = []  # length and innermost stride of each run of axes that follow each other in memory
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1][0] *= size
        else:
            runs.append([size, stride])
    left = iter(runs)
    room = next(left, [1, 1])[0]
    for size in reversed(wanted):
        if size == 1:
            continue
        if room == 1:
            room = next(left, [1, 1])[0]
        if room % size:
            return False
        room //= size
    return True
