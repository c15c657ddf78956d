"""Raise norms from their spellings: layer_norm and rms_norm over the last axis.

rms:   x * rsqrt(mean(x^2) + eps)  or  x / sqrt(mean(x^2) + eps), then * weight in any order, with f32 casts inside, weight maybe one plus a constant
layer: (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)  (or var with correction 0), then * weight, + bias

Read from the reciprocal root upwards and downwards by dataflow. A mean over another axis, a correction of one, an eps outside the root or that
is a tensor that varies: no match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import is_op

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Normed:
    """x normalised at node `out`; centred: with its mean removed."""

    x: Node
    eps: float
    centred: bool
    out: Node


def norms(graph: Graph) -> Graph:
    """The same function with norms as one node each."""
    graph = graph.copy()
    for node in graph.calls:
        found = _normed(graph, node)
        if found is not None:
            _raise(graph, found)
    return graph.clean()


def _normed(graph: Graph, out: Node) -> Normed | None:
    """Whether this node is x times one over the root of its mean square plus eps."""
    if is_op(out, "mul"):
        pairs = [(out.args[0], out.args[1]), (out.args[1], out.args[0])]
        for x, root in pairs:
            inside = _under_rsqrt(root)
            found = _match(graph, x, inside, out) if inside is not None else None
            if found is not None:
                return found
    if is_op(out, "div") and is_op(out.args[1], "sqrt"):
        return _match(graph, out.args[0], out.args[1].args[0], out)  # type: ignore[union-attr]
    return None


def _under_rsqrt(value: Any) -> Any:
    """What stands under the reciprocal root."""
    if is_op(value, "rsqrt"):
        return value.args[0]
    if is_op(value, "reciprocal") and is_op(value.args[0], "sqrt"):
        return value.args[0].args[0]
    if is_op(value, "pow") and value.args[1] == -0.5:
        return value.args[0]
    return None


def _match(graph: Graph, x: Any, inside: Any, out: Node) -> Normed | None:
    if not is_op(inside, "add") or not isinstance(x, Node):
        return None
    mean, eps = inside.args[0], inside.args[1]
    held = graph.constant(eps)
    if held is not None and held.numel() == 1:
        eps = float(held)
    if not isinstance(eps, float) or x.meta["val"].dtype not in WIDE:
        return None
    if is_op(mean, "var"):
        return _from_variance(x, mean, eps, out)
    if not _is_last_mean(mean):
        return None
    square = mean.args[0]
    base = _square_of(square)
    if base is not x:
        return None
    centre = _centre_of(x)
    return Normed(centre, eps, True, out) if centre is not None else Normed(x, eps, False, out)


def _from_variance(x: Node, variance: Node, eps: float, out: Node) -> Normed | None:
    bound, centre = arguments(variance), _centre_of(x)
    correction = bound.get("correction", 0 if bound.get("unbiased") is False else 1)
    if centre is None or variance.args[0] is not centre or correction != 0 or not bound.get("keepdim"):
        return None
    return Normed(centre, eps, True, out) if _is_last(bound.get("dim"), centre) else None


def _is_last(dims: Any, x: Node) -> bool:
    dims = [dims] if isinstance(dims, int) else dims
    rank = len(x.meta["val"].shape)
    return isinstance(dims, (list, tuple)) and [d % rank for d in dims] == [rank - 1]


def _is_last_mean(node: Any) -> bool:
    return is_op(node, "mean") and bool(arguments(node).get("keepdim")) and _is_last(arguments(node).get("dim"), node.args[0])


def _square_of(node: Any) -> Any:
    if is_op(node, "pow") and node.args[1] == 2:
        return node.args[0]
    return node.args[0] if is_op(node, "mul") and node.args[0] is node.args[1] else None


def _centre_of(x: Node) -> Node | None:
    """y where x is y minus its mean over the last axis."""
    if not is_op(x, "sub") or not _is_last_mean(x.args[1]):
        return None
    source = x.args[0]
    return source if isinstance(source, Node) and x.args[1].args[0] is source else None  # type: ignore[union-attr]


def _raise(graph: Graph, found: Normed) -> None:
    """Take the scale (and the bias of a layer norm) in, if each is the only use of what comes before it."""
    width = tensor_type(found.x).shape[-1]
    if not isinstance(width, int):
        return
    out, weight = _take(graph, found.out, "mul", width)
    bias = None
    if found.centred and weight is not None:
        out, bias = _take(graph, out, "add", width)
    b = Builder(graph, out, origin=origin_of(found.out))
    if found.centred:
        made = b.layer_norm(found.x, [width], weight, bias, found.eps)
    else:
        made = b.rms_norm(found.x, [width], weight, found.eps)
    if tensor_type(made) == tensor_type(out):
        graph.replace(out, made)


def _take(graph: Graph, node: Node, op: str, width: int) -> tuple[Node, Node | None]:
    """(node after, constant of the last axis) if the only use of node is `op` with such a constant of its dtype."""
    users = list(node.users)
    if len(users) != 1 or not is_op(users[0], op):
        return node, None
    others = [arg for arg in users[0].args if arg is not node]
    vector = graph.constant(others[0]) if len(others) == 1 else None
    if vector is None or vector.shape != (width,) or vector.dtype != node.meta["val"].dtype:
        return node, None
    return users[0], others[0]  # type: ignore[return-value]
