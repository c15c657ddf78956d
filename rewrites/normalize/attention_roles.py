"""Which axes of the scores are batch, heads, groups of heads, queries and keys.

Keys are what the softmax runs over; queries are an axis that only the query has; other axes that only the query has are heads that share
a key (grouped heads); axes that query and key share are batch and heads. Where only their order could tell batch from heads, an axis that
was cut from the same channels as the head width is heads, else the last one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, Operand, behind_channels, leaves


@dataclass(frozen=True)
class Roles:
    """heads: of the key; groups: query heads per key head. Every axis of the scores is in exactly one of the five."""

    batch: Dim
    heads: Dim
    groups: Dim
    queries: Dim
    keys: Dim


def assign(scores: Dims, keys: Dim, query: Operand, key: Operand, value: Operand, width: Dim, masks: Sequence[set[Axis]]) -> Roles:
    """scores: the dimensions at the softmax; width: the axes summed over in the scores and those of the value's width;
    masks: the axes that each mask varies over.
    """
    keys = leaves(keys)
    channels = set(leaves(width))
    by_channels = behind_channels(query, channels) | behind_channels(key, channels) | behind_channels(value, channels)
    shared_set = (key.axes | value.axes) - set(keys)
    rows = [leaves(dim) for dim in scores if not set(leaves(dim)) & set(keys)]
    queries = _queries(rows, shared_set, query.axes, by_channels, masks)
    shared = [axis for dim in rows for axis in dim if axis in shared_set and axis not in queries]
    own = [axis for dim in rows for axis in dim if axis not in shared_set and axis not in queries]
    before = _before_shared(rows, shared, own) - by_channels  # a batch that keys lack: they are repeated for it
    groups = tuple(axis for axis in own if axis in query.axes and axis.size != 1 and axis not in before)
    shared = [axis for dim in rows for axis in dim if axis not in queries and axis not in groups and (axis in shared or axis in own)]
    inner = by_channels | _behind_single_batch(query) | _behind_single_batch(key) | _behind_single_batch(value)
    heads = _heads([axis for axis in shared if axis.size != 1], rows, inner)
    batch = tuple(axis for axis in shared if axis not in heads)
    return _without_partial_batch(Roles(batch, heads, groups, queries, keys), masks)


def _queries(rows: Sequence[Dim], shared: set[Axis], query: set[Axis], channels: set[Axis], masks: Sequence[set[Axis]]) -> Dim:
    """The last dimension that only the query has; rather one that a mask varies over, and not one that is cut from channels."""
    candidates: list[Dim] = []
    for dim in rows:
        own = tuple(axis for axis in dim if axis not in shared and axis in query)
        if own and len(own) == len([axis for axis in dim if axis.size != 1 or axis in own]):
            plain = tuple(axis for axis in own if axis not in channels)
            candidates.append(plain or own)
    candidates = [dim for dim in candidates if not set(dim) & channels] or candidates
    candidates = [dim for dim in candidates if any(set(dim) & mask for mask in masks)] or candidates
    return candidates[-1] if candidates else ()


def _before_shared(rows: Sequence[Dim], shared: Sequence[Axis], own: Sequence[Axis]) -> set[Axis]:
    """The axes that only the query has, outside of every axis that it shares."""
    order = [axis for dim in rows for axis in dim]
    first = min((order.index(axis) for axis in shared), default=len(order))
    return {axis for axis in own if order.index(axis) < first}


def _behind_single_batch(operand: Operand) -> set[Axis]:
    """The axes of a value of four dimensions whose first is 1: that one is the batch, though views may have dropped it."""
    is_single = len(operand.dims) == 4 and all(axis.size == 1 for axis in leaves(operand.dims[0]))
    return operand.axes if is_single else set()


def _heads(shared: Sequence[Axis], rows: Sequence[Dim], channels: set[Axis]) -> Dim:
    cut = tuple(axis for axis in shared if axis in channels)
    if cut:
        return cut
    places = [dim for dim in rows if set(dim) & set(shared) or (dim and all(axis.size == 1 for axis in dim))]
    mixed = [tuple(axis for axis in dim if axis in shared) for dim in places]
    if len(mixed) > 1 and mixed[-1]:
        return mixed[-1]
    return tuple(shared[1:]) if len(mixed) == 1 and len(shared) > 1 else ()


def _without_partial_batch(roles: Roles, masks: Sequence[set[Axis]]) -> Roles:
    """If a mask varies over some of the batch's axes only, the inner ones count as heads, so that the mask need not be repeated."""
    long = [axis for axis in roles.batch if axis.size != 1]
    for mask in masks:
        varying = [axis in mask for axis in long]
        if any(varying) and not all(varying):
            first = varying.index(not varying[0])
            long = long[:first]
    moved = tuple(axis for axis in roles.batch if axis not in long and axis.size != 1)
    batch = tuple(axis for axis in roles.batch if axis not in moved)
    return Roles(batch, (*moved, *roles.heads), roles.groups, roles.queries, roles.keys)
