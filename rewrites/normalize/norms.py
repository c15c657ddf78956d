"""Raise norms from their spellings: layer_norm and rms_norm over the last axis.

rms:   x * rsqrt(mean(x^2) + eps)  or  x / sqrt(mean(x^2) + eps), then * weight in any order, with f32 casts inside, weight maybe one plus a constant
layer: (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps)  (or var with correction 0), then * weight, + bias

Read from the reciprocal root upwards and downwards by dataflow. A mean over another axis, a correction of one, an eps outside the root or that
is a tensor that varies: no match. Nor is a norm in f16 or bf16 without casts, since it rounds after each step where the op does not; casts
around an f32 norm stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Normed:
    """x normalised, then times weight, at node `out`; centred: with its mean removed."""

    x: Node
    eps: float
    centred: bool
    weight: Node | None
    out: Node


@dataclass(frozen=True)
class Factor:
    value: Any
    divides: bool


def norms(graph: Graph) -> Graph:
    """The same function with norms as one node each."""
    graph = graph.copy()
    for node in graph.calls:
        found = _normed(graph, node) if is_op(node, "mul", "div") and node.users else None
        if found is not None:
            _raise(graph, found)
    return graph.clean()


def _normed(graph: Graph, out: Node) -> Normed | None:
    """Whether this node is x times one over the root of its mean square plus eps, maybe times a weight."""
    parts = factors(out)
    for root in parts:
        inside = _under_root(root)
        found = _match(inside, [part for part in parts if part is not root]) if inside is not None else None
        if found is None:
            continue
        x, eps, centred, rest = found
        width = tensor_type(x).shape[-1]
        if any(part.divides for part in rest) or len(rest) > 1 or not isinstance(width, int):
            continue
        weight = _vector(graph, rest[0].value, width, x, out) if rest else None
        if rest and weight is None:
            continue
        return Normed(x, eps, centred, weight, out)
    return None


def factors(node: Any, only: bool = False, divides: bool = False) -> list[Factor]:
    """What a chain of mul and div multiplies; inner ones are opened if used only here."""
    if not is_op(node, "mul", "div") or (only and len(node.users) != 1) or node.args[0] is node.args[1]:
        return [Factor(node, divides)]
    left, right = node.args[0], node.args[1]
    return [*factors(left, True, divides), *factors(right, True, divides != is_op(node, "div"))]


def _under_root(factor: Factor) -> Any:
    """What stands under the root that this factor divides by."""
    value = factor.value
    if factor.divides:
        return _under_sqrt(value)
    if is_op(value, "rsqrt") or (is_op(value, "pow") and value.args[1] == -0.5):
        return value.args[0]
    return _under_sqrt(value.args[0]) if is_op(value, "reciprocal") else None


def _under_sqrt(value: Any) -> Any:
    return value.args[0] if is_op(value, "sqrt") or (is_op(value, "pow") and value.args[1] == 0.5) else None


def _match(inside: Any, others: list[Factor]) -> tuple[Node, float, bool, list[Factor]] | None:
    """(x, eps, centred, the other factors) if `inside` is a mean square plus eps, and what it is the mean square of is among the factors."""
    if not is_op(inside, "add") or not isinstance(inside.args[1], (int, float)) or inside.meta["val"].dtype not in WIDE:
        return None
    spread, eps = inside.args[0], float(inside.args[1])
    centre = _population_variance(spread)
    base = square_root(last_mean(spread))
    for part in others:
        if part.divides or not isinstance(part.value, Node):
            continue
        rest = [other for other in others if other is not part]
        own_centre = centre_of(part.value)
        if own_centre is not None and (centre is own_centre or base is part.value):
            return own_centre, eps, True, rest
        if base is part.value and part.value.meta["val"].dtype in WIDE:
            return part.value, eps, False, rest
    return None


def last_mean(node: Any) -> Any:
    """What this is the mean of, over the last axis, which is kept; None if it is no such mean."""
    if is_op(node, "mean") and arguments(node).get("dtype") is None:
        return node.args[0] if _keeps_last(node) else None
    if is_op(node, "getitem") and node.args[1] == 1 and _is_var_mean(node.args[0]):
        return node.args[0].args[0]
    if not is_op(node, "mul", "div") or not is_op(node.args[0], "sum") or not _keeps_last(node.args[0]):
        return None
    total, number = node.args
    width = total.args[0].meta["val"].shape[-1]
    if not isinstance(number, (int, float)) or not isinstance(width, int) or arguments(total).get("dtype") is not None:
        return None
    is_mean = number == width if is_op(node, "div") else abs(number * width - 1) < 1e-12
    return total.args[0] if is_mean else None


def _population_variance(node: Any) -> Any:
    """What this is the variance of, over the last axis, with correction 0."""
    if is_op(node, "getitem") and node.args[1] == 0 and _is_var_mean(node.args[0]):
        variance = node.args[0]
    elif is_op(node, "var"):
        variance = node
    else:
        return None
    bound = arguments(variance)
    correction = bound.get("correction", 0 if bound.get("unbiased") is False else 1)
    return variance.args[0] if correction == 0 and correction is not None and _keeps_last(variance) else None


def _is_var_mean(node: Any) -> bool:
    targets = (aten("var_mean.correction"), aten("var_mean.dim"))
    return isinstance(node, Node) and node.target in targets and _keeps_last(node)


def _keeps_last(node: Node) -> bool:
    bound = arguments(node)
    dims, rank = bound.get("dim"), len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    dims = [dims] if isinstance(dims, int) else dims
    return bool(bound.get("keepdim")) and isinstance(dims, (list, tuple)) and [d % rank for d in dims] == [rank - 1]


def square_root(node: Any) -> Any:
    """y where this is y squared."""
    if is_op(node, "pow") and node.args[1] == 2:
        return node.args[0]
    return node.args[0] if is_op(node, "mul") and node.args[0] is node.args[1] else None


def centre_of(x: Any) -> Node | None:
    """y where x is y minus its mean over the last axis."""
    if not is_op(x, "sub") or not isinstance(x.args[0], Node) or x.args[0].meta["val"].dtype not in WIDE:
        return None
    source: Node = x.args[0]
    return source if last_mean(x.args[1]) is source else None


def _vector(graph: Graph, node: Any, width: int, x: Node, before: Node) -> Node | None:
    """This value as a vector along the last axis, of x's dtype; a constant is reshaped to one."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dtype != x.meta["val"].dtype:
        return None
    shape = tuple(node.meta["val"].shape)
    if shape == (width,):
        return node
    tensor = graph.constant(node)
    if tensor is None or tensor.numel() != width or shape[-1:] != (width,) or len(shape) > len(x.meta["val"].shape):
        return None
    return Builder(graph, before, origin=origin_of(node)).constant(f"{node.target}_flat", tensor.reshape(width))


def _raise(graph: Graph, found: Normed) -> None:
    """Take the scale (and the bias of a layer norm) in, if each is the only use of what comes before it."""
    width = tensor_type(found.x).shape[-1]
    out, weight, bias = found.out, found.weight, None
    if weight is None:
        out, weight = _take(graph, out, "mul", found.x)
    if found.centred and weight is not None:
        out, bias = _take(graph, out, "add", found.x)
    b = Builder(graph, out, origin=origin_of(found.out))
    target, scales = ("layer_norm", (weight, bias)) if found.centred else ("rms_norm", (weight,))
    made = getattr(b, target)(found.x, [width], *scales, found.eps)
    if tensor_type(made) == tensor_type(out):
        graph.replace(out, made)


def _take(graph: Graph, node: Node, op: str, x: Node) -> tuple[Node, Node | None]:
    """(node after, vector along the last axis) if the only use of node is `op` with such a vector."""
    users = list(node.users)
    if len(users) != 1 or not is_op(users[0], op) or users[0].kwargs:
        return node, None
    others = [arg for arg in users[0].args if arg is not node]
    vector = _vector(graph, others[0], int(x.meta["val"].shape[-1]), x, users[0]) if len(others) == 1 else None
    return (users[0], vector) if vector is not None else (node, None)
