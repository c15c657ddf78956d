"""Graphs of attention for tests of its kernel: a way to hide keys each, at any lengths, widths, heads and dtype; and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretorch.ir.graph import Graph
from tests import kernel_cases
from tests.kernel_cases import graph_of, vector


@dataclass(frozen=True)
class Lengths:
    """batch, key heads, query heads to each, queries, keys, width of query and key, width of value."""

    batch: int = 2
    heads: int = 2
    group: int = 1
    queries: int = 20
    keys: int = 20
    width: int = 16
    value_width: int = 16

    def types(self, dtype: str) -> dict[str, str]:
        return {
            "query": vector(dtype, self.batch, self.heads * self.group, self.queries, self.width),
            "key": vector(dtype, self.batch, self.heads, self.keys, self.width),
            "value": vector(dtype, self.batch, self.heads, self.keys, self.value_width),
        }


@dataclass(frozen=True)
class Hiding:
    """options: numbers of the op; more: (dtype, lengths) -> the types of a mask, a key bias and lengths, by name."""

    options: dict[str, Any]
    more: Callable[[str, Lengths], dict[str, str]] = lambda dtype, at: {}

    def function(self, b: Any, query: Any, key: Any, value: Any, **more: Any) -> Any:
        options = {"scale": 0.3, **self.options, **({"lengths": more["lengths"]} if "lengths" in more else {})}
        return b.attention(query, key, value, more.get("mask"), more.get("key_bias"), **options)

    def types(self, dtype: str, at: Lengths) -> dict[str, str]:
        return {**at.types(dtype), **self.more(dtype, at)}

    def graph(self, dtype: str, at: Lengths) -> Graph:
        return graph_of(self.function, **self.types(dtype, at))


def bias(dtype: str, at: Lengths) -> dict[str, str]:
    return {"key_bias": vector("f32", at.batch, at.keys)}


HIDING: dict[str, Hiding] = {
    "nothing": Hiding({}),
    "causal": Hiding({"right": 0}),
    "later": Hiding({"right": 0, "offset": 7}),
    "earlier": Hiding({"right": 0, "offset": -3}),
    "window": Hiding({"left": 3, "right": 2}),
    "sinks": Hiding({"left": 17, "right": 0, "sinks": 5}),
    "key_bias": Hiding({}, bias),
    "mask": Hiding({"right": 0}, lambda dtype, at: {"mask": vector("bool", at.batch, 1, at.queries, at.keys)}),
    "added": Hiding({}, lambda dtype, at: {"mask": vector(dtype, at.heads * at.group, at.queries, at.keys)}),
    "padding": Hiding({}, lambda dtype, at: {"mask": vector("bool", at.batch, 1, 1, at.keys)}),
    "all": Hiding(
        {"left": 9, "right": 3, "sinks": 2, "softcap": 4.0, "offset": 1},
        lambda dtype, at: {"mask": vector(dtype, 1, at.heads * at.group, at.queries, 1), **bias(dtype, at)},
    ),
    "lengths": Hiding({}, lambda dtype, at: {"lengths": vector("i64", at.batch, 1)}),
    "lengths of rows": Hiding({}, lambda dtype, at: {"lengths": vector("i32", at.batch, at.queries)}),
    "lengths of queries": Hiding(
        {"left": 11, "right": 4, "sinks": 3}, lambda dtype, at: {"lengths": vector("i64", 1, at.queries), **bias(dtype, at)}
    ),
    "lengths and more": Hiding(
        {"right": 1}, lambda dtype, at: {"mask": vector("bool", at.batch, 1, 1, at.keys), "lengths": vector("i32", at.batch, 1)}
    ),
    "softcap": Hiding({"softcap": 2.0, "right": 0}),
    "negative": Hiding({"scale": -0.2}),
}


def inputs_of(graph: Graph, seed: int = 0) -> list[Tensor]:
    """Random inputs; numbers of keys from below none to above all."""
    inputs = kernel_cases.inputs_of(graph, seed)
    keys = max((x.shape[2] for x in inputs if x.dim() == 4 and x.is_floating_point()), default=0)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-2, keys + 3, x.shape, generator=generator, dtype=x.dtype) if x.dtype in (torch.int32, torch.int64) else x
        for x in inputs
    ]


LENGTHS = {
    "one": Lengths(1, 1, 1, 1, 1, 1, 1),
    "odd": Lengths(2, 1, 3, 7, 13, 5, 9),
    "prime": Lengths(1, 2, 2, 37, 41, 20, 20),
    "power": Lengths(1, 2, 1, 64, 64, 32, 32),
    "more than a block": Lengths(1, 1, 2, 70, 150, 24, 40),
}
