"""Weights per token that were computed before a merge and are multiplied in after it, such as the mask of a mean over real tokens.

They are merged along with the tokens: the size-weighted mean of a group's weights is what the group's sum needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from paretorch.ir.analyze import AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.ir.types import DTYPES
from paretorch.rewrites.token_merging.place import Place
from paretorch.rewrites.token_merging.rows import may_weigh, number_per_token, restored, rows_of, weight_chain


def merge_companions(graph: Graph, axes: AxisFacts, place: Place, b: Builder, merge: Callable[[Builder, Node], Node]) -> None:
    """Let products downstream, and steps that were put there before, read merged weights. merge: (builder, rows [B,T,1]) -> rows [B,T',1].

    What is not a weight per token stays as it is; its length then forbids the merge.
    """
    inside = {place.value, *place.downstream}
    for node in place.downstream:
        for weight in may_weigh(node):
            chain = weight_chain(axes, place.axis.atom, place.batch, weight) if weight not in inside else None
            if chain:
                at = Builder(graph, node, origin=b.origin, rule=b.rule, site=b.site)
                node.replace_input_with(weight, _merged(at, axes, place, chain, merge))


def _merged(at: Builder, axes: AxisFacts, place: Place, chain: list[Node], merge: Callable[[Builder, Node], Node]) -> Node:
    first, layout = chain[0], number_per_token(axes, place.axis.atom, place.batch, chain[0])
    assert layout is not None  # weight_chain ends at such a value
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
