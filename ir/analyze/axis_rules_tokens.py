"""Axis rules of the ops on tokens: a match begins a new axis, that of the rows that stay, and what is merged by it runs over that axis."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dims
from paretorch.ir.analyze.walk import Walk
from paretorch.ir.graph import arguments
from paretorch.ir.ops.tokens import is_match


def match_tokens(walk: Walk, node: Node) -> list[Dims]:
    """kept[B, T - r], source[B, r], target[B, r] from metric[B, T, D] or weight[B, T]: the length of what is kept depends on that of the tokens."""
    batch, tokens = walk.dims(node.args[0])[:2]  # type: ignore[arg-type]
    kept, source, _ = walk.type(node).items
    merged = walk.one(node, source.shape[1])
    return [[batch, walk.one(node, kept.shape[1], tokens)], [batch, merged], [batch, merged]]


def merge_tokens(walk: Walk, node: Node) -> list[Dims]:
    """x[B, T, C] and size[B, T] with the axis of the rows that are kept instead of their tokens, which are those that the match saw."""
    batch, tokens, width = walk.dims(node.args[0])  # type: ignore[arg-type]
    kept = walk.dims(node.args[1])[1]  # type: ignore[arg-type]
    for matched in _matched(node.args[1]):
        walk.atoms.meet(tokens, walk.dims(matched)[1])
    return [[batch, kept, width], [batch, kept]]


def _matched(kept: Any) -> list[Node]:
    """What the match that these rows come from looked at."""
    match = kept.args[0] if kept.target is operator.getitem else None
    return [match.args[0]] if isinstance(match, Node) and is_match(match) else []  # type: ignore[list-item]


def source_map(walk: Walk, node: Node) -> Dims:
    """Rows that tokens went to: along the tokens of the first match."""
    previous = arguments(node)["previous"]
    if previous is not None:
        return walk.dims(previous)
    batch = walk.dims(node.args[0])[0]  # type: ignore[arg-type]
    return [batch, walk.one(node, walk.shape(node)[1], walk.dims(node.args[0])[1])]  # type: ignore[arg-type]


def weigh_tokens(walk: Walk, node: Node) -> Dims:
    """As x."""
    return walk.dims(node.args[0])  # type: ignore[arg-type]


def class_weights(walk: Walk, node: Node) -> Dims:
    """[B, T] from key[B, H, T, D]."""
    batch, _, tokens, _ = walk.dims(arguments(node)["key"])
    return [batch, tokens]


TOKEN_RULES: dict[str, Callable[[Walk, Node], Any]] = {
    "match_tokens": match_tokens, "merge_tokens": merge_tokens, "source_map": source_map, "weigh_tokens": weigh_tokens,
    "class_weights": class_weights,
}  # fmt: skip
