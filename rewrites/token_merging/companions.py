"""Weights per token that were computed before a merge and are multiplied in after it, such as the mask of a mean over real tokens.

They are merged along with the tokens: the size-weighted mean of a group's weights is what the group's sum needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.analyze import AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.tokens import is_reduction
from paretorch.ir.types import DTYPES
from paretorch.rewrites.token_merging.place import Layout, Place, layout_of
from paretorch.rewrites.token_merging.rows import restored, rows_of


def merge_companions(graph: Graph, axes: AxisFacts, place: Place, b: Builder, merge: Callable[[Builder, Node], Node]) -> None:
    """Let products downstream, and steps that were put there before, read merged weights. merge: (builder, rows [B,T,1]) -> rows [B,T',1].

    What is not a weight per token stays as it is; its length then forbids the merge.
    """
    inside = {place.value, *place.downstream}
    for node in place.downstream:
        read: list[Any] = node.all_input_nodes if is_op(node, "mul") else [node.args[0]] if is_reduction(node) else []
        for weight in read:
            tokens = axes.dim(weight.name, place.axis.atom)
            chain = _chain(axes, place, weight) if weight not in inside and tokens is not None else None
            if chain:
                at = Builder(graph, node, origin=b.origin, rule=b.rule, site=b.site)
                node.replace_input_with(weight, _merged(at, axes, place, chain, merge))


def _chain(axes: AxisFacts, place: Place, weight: Node) -> list[Node] | None:
    """From a value that is one number per token to this weight, by casts and expansions only; None if it is more than that."""
    chain = [weight]
    while _numbers(axes, place, chain[0]) is None:
        source = chain[0].all_input_nodes
        if not is_op(chain[0], "expand", "to", "unsqueeze") or len(source) != 1:
            return None
        chain.insert(0, source[0])
    return chain


def _numbers(axes: AxisFacts, place: Place, node: Node) -> Layout | None:
    """The layout of a value that holds one number per token; None for any other."""
    layout = layout_of(axes, node, place.axis.atom, place.batch)
    if layout is None:
        return None
    rest = [size for dim, size in enumerate(shape_of(node)) if dim != layout.token and dim not in layout.batch]
    return layout if all(size == 1 for size in rest) else None


def _merged(at: Builder, axes: AxisFacts, place: Place, chain: list[Node], merge: Callable[[Builder, Node], Node]) -> Node:
    first, layout = chain[0], _numbers(axes, place, chain[0])
    assert layout is not None  # _chain ends at such a value
    rows = rows_of(at, first, layout)
    if not DTYPES[tensor_type(first).dtype].is_floating_point:
        rows = at.call(aten("_to_copy.default"), (rows,), {"dtype": torch.float32})
    current = restored(at, merge(at, rows), first, layout)
    for node, source in zip(chain[1:], chain, strict=False):
        args = list(node.args)
        if is_op(node, "expand"):
            sizes, tokens = list(args[1]), axes.dim(node.name, place.axis.atom)  # type: ignore[arg-type]
            args[1] = [-1 if dim == tokens else size for dim, size in enumerate(sizes)]
        current = at.call(node.target, [current if argument is source else argument for argument in args], dict(node.kwargs))
    return current
