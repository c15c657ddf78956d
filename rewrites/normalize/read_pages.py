"""Keys and values gathered from pages, as attention that reads them through the table.

attention(q, view(key[pages]), view(value[pages]), ...)   ->   paged_attention(q, key, value, pages, ...)

Exact: key j of a sample is slot j % S of page pages[b, j // S] before and after; what is gathered is never made. Like counted keys this is a form
for a runtime whose kernel reads a table. The gather is an `index` or `index_select` along one axis of a pool, by a table of whole numbers that
differs along batch and keys alone, with any views after it; the pool's other axes are heads, slots and width in any order.
Source: Kwon et al. 2023, arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.ops.attention import COUNTS
from paretorch.rewrites.normalize.attention_emit import Emitter
from paretorch.rewrites.normalize.attention_softmax import Unraised
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, is_tensor, leaves, spelled, trace
from paretorch.rewrites.rule import Refusal

NAME = "read_pages"


@dataclass(frozen=True)
class Gathered:
    """Rows of a pool. pool, dims: the pool and its axes, of which `place` is the one that is looked up; table, table_dims: by what."""

    pool: Node
    dims: Dims
    place: int
    table: Node
    table_dims: Dims

    @property
    def slots(self) -> list[Axis]:
        """The axes of the pool beside that of its pages."""
        return [axis for place, dim in enumerate(self.dims) if place != self.place for axis in leaves(dim)]


@dataclass(frozen=True)
class Paged:
    """An attention to pages; groups: the axes of a pool, as pages, heads, slots and width."""

    key: Gathered
    value: Gathered
    table: tuple[Dim, Dim]
    key_groups: list[Dim]
    value_groups: list[Dim]


def read_pages(graph: Graph) -> Graph:
    """The graph with paged attention wherever keys and values come from pages; the same object where none do."""
    if not any(isinstance(found, Paged) for _, found in _sites(graph)):
        return graph
    graph = graph.copy()
    emitter = Emitter(graph)
    for node, found in list(_sites(graph)):
        if isinstance(found, Paged):
            emitter.at(node, origin_of(node))
            graph.replace(node, _written(emitter, node, found))
    return graph.clean()


def page_refusals(graph: Graph) -> list[Refusal]:
    """Why attentions whose keys or values are looked up in a pool do not read it through the table."""
    return [Refusal(NAME, node.name, found) for node, found in _sites(graph) if isinstance(found, str)]


def _sites(graph: Graph) -> Iterator[tuple[Node, Paged | str]]:
    """Each attention to something that is looked up, with what it reads or a sentence."""
    for node in graph.calls:
        if not is_op(node, "attention"):
            continue
        given = arguments(node)
        batch, heads, keys = (Axis(size) for size in shape_of(given["key"])[:3])
        widths = [Axis(shape_of(given[name])[3]) for name in ("key", "value")]
        found = [
            _gathered(given[name], [(batch,), (heads,), (keys,), (width,)]) for name, width in zip(("key", "value"), widths, strict=True)
        ]
        if found[0] is None and found[1] is None:
            continue
        if found[0] is None or found[1] is None:
            looked, whole = ("key", "value") if found[1] is None else ("value", "key")
            yield node, f"{node.name} looks its {looked} up in {(found[0] or found[1]).pool.name}, but not its {whole}"  # type: ignore[union-attr]
            continue
        yield node, _paged(node, (found[0], found[1]), ((batch,), (heads,), (keys,), *((width,) for width in widths)))


def _gathered(node: Node, dims: Dims) -> Gathered | None:
    """What is looked up, behind views; None if nothing is."""
    seen = trace(node, dims)
    given = arguments(seen.node) if spelled(seen.node) in ("index", "index_select") else {}
    if spelled(seen.node) == "index_select":
        pool, table, place = given["self"], given["index"], given["dim"] % len(shape_of(given["self"]))
    elif given:
        pool, tables = given["self"], list(given["indices"])
        places = [place for place, table in enumerate(tables) if table is not None]
        if len(places) != 1:
            return None
        place, table = places[0], tables[places[0]]
    else:
        return None
    if not is_tensor(table) or tensor_type(table).dtype not in COUNTS:
        return None
    rank = len(shape_of(table))
    looked = trace(table, seen.dims[place : place + rank])
    pool_dims: Dims = [*seen.dims[:place], (Axis(shape_of(pool)[place]),), *seen.dims[place + rank :]]
    return Gathered(pool, pool_dims, place, looked.node, looked.dims)


def _paged(node: Node, found: tuple[Gathered, Gathered], roles: tuple[Dim, ...]) -> Paged | str:
    """roles: batch, heads, keys, width of keys and of values."""
    key, value = found
    batch, heads, keys, *widths = (_long(dim) for dim in roles)
    if key.table is not value.table or [_long(dim) for dim in key.table_dims] != [_long(dim) for dim in value.table_dims]:
        return f"{node.name} looks its key up by {key.table.name} and its value by {value.table.name}"
    named = [axis for dim in key.table_dims for axis in _long(dim)]
    numbers = tuple(axis for axis in named if axis not in batch)
    slots = keys[len(numbers) :]
    if set(named) - set(batch) != set(keys[: len(numbers)]) or numbers != keys[: len(numbers)]:
        return f"the table {key.table.name} of {node.name} does not say which pages of slots its keys are, one after another"
    groups = [[_long(pool.dims[pool.place]), heads, slots, width] for pool, width in zip(found, widths, strict=True)]
    for pool, wanted in zip(found, groups, strict=True):
        if {axis for axis in pool.slots if axis.size != 1} != {axis for dim in wanted[1:] for axis in dim}:
            return f"the pool {pool.pool.name} of {node.name}, {tensor_type(pool.pool)}, is not made of pages, heads, slots and width"
    return Paged(key, value, (tuple(axis for axis in named if axis in batch), numbers), *groups)


def _long(dim: Dim) -> Dim:
    return tuple(axis for axis in leaves(dim) if axis.size != 1)


def _written(emitter: Emitter, node: Node, found: Paged) -> Node:
    given = arguments(node)
    try:
        table = emitter.arrange(found.key.table, found.key.table_dims, found.table, full=False)
        pools = [
            emitter.arrange(pool.pool, pool.dims, groups, full=True)
            for pool, groups in ((found.key, found.key_groups), (found.value, found.value_groups))
        ]
    except Unraised:  # a size that has no name; the gather stays
        return node
    options = {name: value for name, value in node.kwargs.items() if name not in ("mask", "key_bias")}
    target: Any = torch.ops.paretorch.paged_attention.default
    return emitter.emit(target, given["query"], *pools, table, given["mask"], given["key_bias"], **options)
