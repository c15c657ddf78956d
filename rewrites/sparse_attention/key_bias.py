"""Masks that say one thing per key, as the key bias of an attention node."""

from __future__ import annotations

import torch
from torch.fx import Node

from paretorch.ir.analyze.mask_sides import HIDING
from paretorch.ir.builder import Builder
from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.ir.ops import aten
from paretorch.ir.types import Size


def mask_by_pairs(node: Node) -> str | None:
    """A sentence if the node's mask differs between queries or heads, or its keys are counted; None if it is one value per key, or absent.

    node: an attention; its mask is broadcast to [B, H, Tq, Tk].
    """
    mask, lengths = arguments(node)["mask"], arguments(node)["lengths"]
    if lengths is not None:
        return f"{node.name} counts its keys: {lengths.name}, {tensor_type(lengths)}, says by their places which are seen"
    if mask is None:
        return None
    shape = shape_of(mask)
    inner = [size for size in shape[-3:-1] if size != 1]
    return f"the mask of {node.name}, {tensor_type(mask)}, says something about pairs of places, not only about keys" if inner else None


def is_table(node: Node) -> bool:
    """Whether an attention's mask is a constant for pairs of places, such as a bias by distance, which tells of no padding."""
    mask = arguments(node)["mask"]
    return mask is not None and mask.op == "get_attr" and mask_by_pairs(node) is not None


def seen_keys(b: Builder, mask: Node) -> Node:
    """f32[B,Tk] or [1,Tk]: 1 for a key that some query of some head sees, 0 for padding, from a mask of pairs of places [..,Tq,Tk]."""
    wide = b.call(aten("_to_copy.default"), (mask,), {"dtype": torch.float32}) if tensor_type(mask).dtype == "bool" else mask
    rank = len(shape_of(mask))
    most = b.amax(wide, list(range(1, rank - 1)) if rank == 4 else list(range(rank - 1)))
    most = most if rank == 4 else b.unsqueeze(most, 0)
    seen = b.call(aten("gt.Scalar"), (most, 0.5 if wide is not mask else HIDING))
    return b.call(aten("_to_copy.default"), (seen,), {"dtype": torch.float32})


def key_bias_of(b: Builder, node: Node) -> Node | None:
    """What the node's mask and key bias add to the scores of each key, T[B, Tk] or T[1, Tk]; None if neither is there.

    Emits through b. The mask must be one value per key.
    """
    given = arguments(node)
    bias: Node | None = given["key_bias"]
    mask: Node | None = given["mask"]
    if mask is None:
        return bias
    flat = per_key(b, mask, shape_of(given["key"])[-2])
    if tensor_type(flat).dtype == "bool":
        zero = b.constant("no_bias", torch.zeros(()))
        flat = b.call(aten("where.self"), (flat, zero, b.constant("hidden", torch.tensor(float("-inf")))))
    return flat if bias is None else b.add(flat, bias)


def per_key(b: Builder, mask: Node, keys: Size) -> Node:
    """A mask [B, 1, 1, Tk], or one that is broadcast to it, as [B, Tk] or [1, Tk]. keys: Tk."""
    rank = len(shape_of(mask))
    if rank == 1:
        mask = b.unsqueeze(mask, 0)
    for _ in range(rank - 2):
        mask = b.select(mask, -2, 0)
    return b.expand(mask, [-1, keys]) if shape_of(mask)[-1] == 1 != keys else mask
