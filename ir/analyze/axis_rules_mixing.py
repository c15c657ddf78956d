"""Axis rules of ops that contract an axis: products, attention, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dim, Dims
from paretorch.ir.analyze.mask_sides import may_hide_later
from paretorch.ir.analyze.walk import Mixer, Walk, is_masking, place
from paretorch.ir.graph import arguments
from paretorch.ir.ops import is_op


def linear(walk: Walk, node: Node) -> Dims:
    """x[..., C] with weight[D, C], or with one whose second axis is split."""
    x, weight = node.args[0], node.args[1]
    dims = walk.dims(x)  # type: ignore[arg-type]
    _contracts(walk, node, dims[-1], weight)
    return [*dims[:-1], walk.one(node, walk.shape(node)[-1])] if len(walk.shape(weight)) > 1 else dims[:-1]  # type: ignore[arg-type]


def _contracts(walk: Walk, node: Node, dim: Dim, weight: Any) -> None:
    shape = list(walk.shape(weight))
    walk.event(node, "bakes_length", [dim], f"{place(node)} multiplies along the axis with weights of shape {shape}")


def matmul(walk: Walk, node: Node) -> Dims:
    return product(walk, node, node.args[0], node.args[1])


def addmm(walk: Walk, node: Node) -> Dims:
    """bias + left @ right."""
    made = product(walk, node, node.args[1], node.args[2])
    return walk.broadcast([made, walk.dims(node.args[0])])  # type: ignore[arg-type]


def product(walk: Walk, node: Node, left: Any, right: Any) -> Dims:
    """[..., M, K] @ [..., K, N], or vectors. An axis of constant length is baked in; two computed values mix along it."""
    ours, theirs = walk.dims(left), walk.dims(right)
    one_side = ours if len(ours) > 1 else [(), *ours]
    other = theirs if len(theirs) > 1 else [*theirs, ()]
    row, inner, column = one_side[-2], one_side[-1], other[-1]
    if walk.atoms.size(inner) == walk.atoms.size(other[-2]):
        inner = walk.atoms.meet(inner, other[-2])
    if walk.constant[node]:
        row, column = (dim and walk.atoms.resolve(dim) for dim in (row, column))
    elif walk.constant[right]:
        _contracts(walk, node, inner, right)
        column = walk.one(node, walk.atoms.size(column))
    elif walk.constant[left]:
        _contracts(walk, node, inner, left)
        row = walk.one(node, walk.atoms.size(row))
    else:
        walk.event(node, "mixes", [inner, row, column])
        walk.mixers.append(Mixer(node.name, _joined(one_side[:-2]), row, one_side[-1], _spelled_causal(walk, left)))
    outer = walk.broadcast([one_side[:-2], other[:-2]])
    return [*outer, *([row] if len(ours) > 1 else []), *([column] if len(theirs) > 1 else [])]


def softmax(walk: Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])  # type: ignore[arg-type]
    walk.event(node, "mixes", [dims[arguments(node)["dim"]]])
    return dims


def attention(walk: Walk, node: Node) -> Dims:
    """query[B, H, Tq, D], key[B, Hk, Tk, D], value[B, Hk, Tk, Dv], mask [B, H, Tq, Tk] or broadcast to it, key_bias[B, Tk],
    lengths[B, Tq]."""
    given = arguments(node)
    query, key, value = (walk.dims(given[name]) for name in ("query", "key", "value"))
    inner = walk.atoms.meet(key[-2], value[-2])
    walk.atoms.meet(query[-1], key[-1])
    outer = [_meet_equal(walk, dim, _meet_equal(walk, *pair)) for dim, *pair in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    mask, bias = given.get("mask", given.get("attn_mask")), given.get("key_bias")
    row = walk.atoms.resolve(query[-2])
    causal = bool(given.get("is_causal")) or given.get("right", -1) >= 0
    if mask is not None:
        _, _, row, inner = ([(), (), row, inner] if len(walk.dims(mask)) <= 2 else walk.broadcast([[*outer, row, inner], walk.dims(mask)]))[
            -4:
        ]
        causal = causal or _mask(walk, node, mask, [row, inner])
    if bias is not None:
        inner = walk.broadcast([[(), inner], walk.dims(bias)])[-1]
    if given.get("lengths") is not None:
        _, row = walk.broadcast([[(), row], walk.dims(given["lengths"])])
        walk.event(node, "bakes_length", [inner], f"{place(node)} counts its keys ({given['lengths'].name} of them are seen)")
        causal = causal or walk.shape(given["lengths"])[1] != 1
    walk.event(node, "mixes", [row, inner])
    walk.mixers.append(Mixer(node.name, _joined(outer), row, inner, causal))
    return [*outer, row, value[-1]]


def _joined(dims: Sequence[Dim]) -> Dim:
    return tuple(atom for dim in dims for atom in dim)


def _meet_equal(walk: Walk, left: Dim, right: Dim) -> Dim:
    """Batch and heads of query and key are one axis; grouped heads are not."""
    return walk.atoms.meet(left, right) if walk.atoms.size(left) == walk.atoms.size(right) else left


def _mask(walk: Walk, node: Node, mask: Node, axes: Sequence[Dim]) -> bool:
    """Tell of a mask that says something about pairs of places; returns whether it may hide later keys."""
    shape = walk.shape(mask)
    rows = len(shape) >= 2 and shape[-2] != 1
    if walk.constant[mask]:
        own = [axis for axis, size in zip(axes, shape[-2:], strict=False) if size != 1]
        walk.event(node, "positions", own, f"{place(node)} has a constant mask of shape {list(shape)}, by place")
        tensor = walk.graph.known(mask)
        if tensor is not None:
            return bool(is_masking(tensor))
        return rows
    return rows and may_hide_later(walk.graph, mask)


def _spelled_causal(walk: Walk, left: Any) -> bool:
    """Whether spelled-out weights come from scores that may hide later keys: back from the product to the softmax and its mask."""
    current, seen_softmax = left, False
    for _ in range(12):
        if not isinstance(current, Node) or current.op != "call_function" or is_op(current, "matmul", "bmm", "mm", "baddbmm"):
            return False
        seen_softmax = seen_softmax or is_op(current, "softmax")
        operands = [argument for argument in current.all_input_nodes if argument in walk.maps]
        for operand in operands[1:] if seen_softmax else []:
            tensor = walk.graph.known(operand)
            shape = walk.shape(operand)
            if len(shape) >= 2 and shape[-2] != 1 and shape[-1] != 1 and (tensor is None or is_masking(tensor)):
                return True
        if not operands:
            return False
        current = operands[0]
    return False
