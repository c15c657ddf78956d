"""Everything about one attention, found from its softmax or from torch's own op, before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.rewrites.normalize.attention_roles import Roles, assign
from paretorch.rewrites.normalize.attention_scores import Added, Chain, Filled, Item, Walk
from paretorch.rewrites.normalize.attention_softmax import FLOATS, Softmax, Unraised, follow
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, Operand, aligned, regroup, trace
from paretorch.rewrites.normalize.masks import Part, Placed
from paretorch.rewrites.normalize.masks_index import Strip
from paretorch.rewrites.normalize.masks_known import Known


@dataclass(frozen=True)
class Found:
    """scores: dimensions where the softmax is; width: the axes of the head width; node, dims: the result that is replaced.

    items, zeroed, causal: as masks_join takes them; temperatures: as in attention_scores.
    """

    query: Operand
    key: Operand
    value: Operand
    scores: Dims
    keys: Dim
    width: Dim
    value_width: Dim
    node: Node
    dims: Dims
    scale: float
    softcap: float = 0.0
    items: tuple[Item, ...] = ()
    zeroed: list[tuple[Node, bool]] = field(default_factory=list)
    causal: list[Part] = field(default_factory=list)
    temperatures: tuple[tuple[Node, Dims, bool], ...] = ()

    @property
    def dtype(self) -> str:
        """The widest type of the operands."""
        types = {operand.type.dtype for operand in (self.query, self.key, self.value)}
        return "f32" if types == {"f16", "bf16"} else min(types, key=FLOATS.index)

    def roles(self, masks: list[set[Axis]]) -> Roles:
        """masks: the axes that each mask varies over."""
        return assign(self.scores, self.keys, self.query, self.key, self.value, (*self.width, *self.value_width), masks)


def match_softmax(softmax: Softmax, known: Known) -> Found:
    """The attention around a softmax. Raises Unraised with the reason if there is none."""
    weights = follow(softmax, known)
    scores = Walk(known).back(softmax.scores, list(weights.score_dims), Chain(weights.keys))
    weighted, chain = weights.weighted, scores.chain
    inner = {*weights.inner, *chain.passed}
    for node in [*chain.passed, *weights.inner]:
        others = [user.name for user in node.users if user not in inner and user is not weighted.node]
        if others:
            raise Unraised(f"{node.name} inside the attention is also used by {', '.join(others)}")
    found = Found(
        scores.query, scores.key, trace(weighted.value, weighted.value_dims), weights.score_dims, weights.keys, scores.width,
        weighted.width, weighted.node, weighted.dims, scores.scale, chain.cap, chain.items, weights.zeroed, [], chain.temperatures,
    )  # fmt: skip
    return _checked(found)


def _checked(found: Found) -> Found:
    for operand in (found.query, found.key, found.value):
        if operand.type.dtype not in FLOATS:
            raise Unraised(f"{operand.node.name} is {operand.type}; attention takes real numbers")
    if not math.isfinite(found.scale):
        raise Unraised(f"the scores are scaled by {found.scale}")
    return found


def match_torch(node: Node, known: Known) -> Found:
    """The attention of one call of scaled_dot_product_attention. Raises Unraised."""
    given = arguments(node)
    mask = given["attn_mask"]
    if given["dropout_p"] != 0.0:
        raise Unraised(f"{node.name} drops weights at random, dropout_p={given['dropout_p']}")
    sizes = shape_of(node)
    depth = shape_of(given["query"])[-1]
    batch: Dims = [(Axis(size),) for size in sizes[:-2]]
    rows, keys = (Axis(sizes[-2]),), (Axis(shape_of(given["key"])[-2]),)
    width, value_width = (Axis(depth),), (Axis(sizes[-1]),)
    outer = [_outer_dims(given[name], batch, sizes) for name in ("query", "key", "value")]
    query = trace(given["query"], [*outer[0], rows, width], known.number)
    key = trace(given["key"], [*outer[1], keys, width], known.number)
    value = trace(given["value"], [*outer[2], keys, value_width])
    scale = given["scale"] if given["scale"] is not None else _default_scale(node, depth)
    if not isinstance(scale, (int, float)):
        raise Unraised(f"{node.name} has a scale that is computed")
    items: tuple[Item, ...] = ()
    if mask is not None:
        dims = aligned([*batch, rows, keys], shape_of(mask), (*sizes[:-1], shape_of(given["key"])[-2]))
        items = (Filled(mask, dims, False, -math.inf) if tensor_type(mask).dtype == "bool" else Added(mask, dims),)
    causal: list[Part] = [Placed(Strip(keys, rows, high=0), None)] if given["is_causal"] else []
    scale = float(scale) * query.factor * key.factor
    return _checked(Found(query, key, value, [*batch, rows, keys], keys, width, value_width, node, [*batch, rows, value_width], scale,
                          items=items, causal=causal))  # fmt: skip


def _default_scale(node: Node, depth: Any) -> float:
    if not isinstance(depth, int):
        raise Unraised(f"{node.name} scales by a head width that is not fixed, {depth}")
    return 1.0 / math.sqrt(depth)


def _outer_dims(operand: Node, batch: Dims, sizes: tuple[Any, ...]) -> Dims:
    """The batch dimensions of an operand, its heads repeated to the query's where there are fewer (enable_gqa)."""
    outer = shape_of(operand)[:-2]
    dims = aligned(batch, outer, sizes[:-2])
    if outer and outer[-1] not in (1, sizes[-3]):
        pair = regroup(batch[-1], [outer[-1], sizes[-3] // outer[-1]])
        if pair is None:
            raise Unraised(f"{operand.name} has {outer[-1]} heads, which do not divide {sizes[-3]}")
        dims[-1] = pair[0]
    return dims
