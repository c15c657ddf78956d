"""Axis rules of the ops on tokens: a match begins a new axis, that of the rows that stay, and what is merged by it runs over that axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze.atoms import Dims
from paretorch.ir.analyze.view_axes import view_dims
from paretorch.ir.analyze.walk import Walk, place
from paretorch.ir.graph import arguments
from paretorch.ir.ops.tokens import match_of


def match_tokens(walk: Walk, node: Node) -> list[Dims]:
    """kept[B, T - r], source[B, r], target[B, r] from metric[B, T, D] or weight[B, T]: the length of what is kept depends on that of the tokens."""
    batch, tokens = walk.dims(node.args[0])[:2]  # type: ignore[arg-type]
    kept, source = walk.type(node).items[:2]
    merged = walk.one(node, source.shape[1])
    return [[batch, walk.one(node, kept.shape[1], tokens)], [batch, merged], [batch, merged]]


def match_above(walk: Walk, node: Node) -> list[Dims]:
    """As match_tokens, and a map along the tokens."""
    batch, tokens = walk.dims(node.args[0])[:2]  # type: ignore[arg-type]
    return [*match_tokens(walk, node), [batch, tokens]]


def merge_tokens(walk: Walk, node: Node) -> list[Dims]:
    """x[B, T, C] and size[B, T] with the axis of the rows that are kept instead of their tokens, which are those that the match saw."""
    batch, tokens, width = walk.dims(node.args[0])  # type: ignore[arg-type]
    kept, match = walk.dims(node.args[1])[1], match_of(node.args[1])  # type: ignore[arg-type]
    if match is not None:
        walk.atoms.meet(tokens, walk.dims(match.args[0])[1])  # type: ignore[arg-type]
    return [[batch, kept, width], [batch, kept]]


def source_map(walk: Walk, node: Node) -> Dims:
    """Rows that tokens went to: along the tokens that the first match saw."""
    previous, kept = arguments(node)["previous"], arguments(node)["kept"]
    if previous is not None:
        return walk.dims(previous)
    match = match_of(kept)
    if match is not None:
        return walk.dims(match.args[0])[:2]  # type: ignore[arg-type]
    batch, rows = walk.dims(kept)
    return [batch, walk.one(node, walk.shape(node)[1], rows)]


def follow_map(walk: Walk, node: Node) -> Dims:
    """Along the tokens of the earlier map."""
    return walk.dims(node.args[1])  # type: ignore[arg-type]


def unmerge_tokens(walk: Walk, node: Node) -> Dims:
    """x[B, T', C] along the tokens of the map places[B, T]."""
    x, places = walk.dims(node.args[0]), walk.dims(node.args[1])  # type: ignore[arg-type]
    walk.restored.append((node.name, places[1]))
    return [x[0], places[1], x[2]]


def weigh_tokens(walk: Walk, node: Node) -> Dims:
    """As x."""
    return walk.dims(node.args[0])  # type: ignore[arg-type]


def class_weights(walk: Walk, node: Node) -> Dims:
    """[B, T] from key[B, H, T, D]."""
    batch, _, tokens, _ = walk.dims(arguments(node)["key"])
    return [batch, tokens]


def places_among(walk: Walk, node: Node) -> Dims:
    """i64[B, before + K + after] from kept[B, K]: where the tokens stood among others, so none may have gone before the choice."""
    kept: Node = node.args[0]  # type: ignore[assignment]
    (batch, rows), match = walk.dims(kept), match_of(kept)
    tokens = walk.dims(match.args[0])[1] if match is not None else rows  # type: ignore[arg-type]
    walk.event(node, "positions", [tokens], f"{place(node)} keeps the places of what is left of {arguments(node)['tokens']} tokens")
    return [batch, walk.one(node, walk.shape(node)[1], rows)]


def match_to_places(walk: Walk, node: Node) -> list[Dims]:
    """As match_tokens, with the places of destinations baked in."""
    tokens = walk.dims(node.args[0])[1]  # type: ignore[arg-type]
    walk.event(
        node, "positions", [tokens], f"{place(node)} has its destinations at fixed places among the {walk.atoms.size(tokens)} tokens"
    )
    return match_tokens(walk, node)


def assign_tokens(walk: Walk, node: Node) -> Dims:
    """map[B, K, T] from metric[B, T, D], with windows of places baked in."""
    batch, tokens, _ = walk.dims(node.args[0])  # type: ignore[arg-type]
    walk.event(node, "positions", [tokens], f"{place(node)} has windows at fixed places among the {walk.atoms.size(tokens)} tokens")
    return [batch, walk.one(node, walk.shape(node)[1], tokens), tokens]


def merge_by_map(walk: Walk, node: Node) -> list[Dims]:
    """x[B, T, C] and size[B, T] with the axis of the destinations in map[B, K, T]."""
    batch, tokens, width = walk.dims(node.args[0])  # type: ignore[arg-type]
    _, destinations, shared_out = walk.dims(node.args[1])  # type: ignore[arg-type]
    walk.atoms.meet(tokens, shared_out)
    return [[batch, destinations, width], [batch, destinations]]


def unmerge_by_map(walk: Walk, node: Node) -> Dims:
    """x[B, K, C] along the tokens of map[B, K, T]."""
    x, tokens = walk.dims(node.args[0]), walk.dims(node.args[1])[2]  # type: ignore[arg-type]
    walk.restored.append((node.name, tokens))
    return [x[0], tokens, x[2]]


def fold_frames(walk: Walk, node: Node) -> Dims:
    """[B, N * G, C] from x[B * G, N, C]: a new axis whose length follows from that of the tokens; how many tokens a row has, and which rows are
    neighbours, is baked in."""
    batch, tokens, width = walk.dims(node.args[0])  # type: ignore[arg-type]
    given, shape = arguments(node), walk.shape(node)
    count = given["count"]
    if given["leading"]:
        walk.event(node, "selects", [tokens])
    reason = f"{place(node)} folds {count} rows of the batch into one, place by place of their {walk.atoms.size(tokens)} tokens"
    walk.event(node, "positions", [tokens, batch], reason)
    outer = view_dims(walk.atoms, [batch], [shape[0], count], node.name)[0]
    return [outer, walk.one(node, shape[1], tokens), width]


def unfold_frames(walk: Walk, node: Node) -> Dims:
    """[B * G, N, C] from x[B, N * G, C]."""
    batch, tokens, width = walk.dims(node.args[0])  # type: ignore[arg-type]
    given, shape = arguments(node), walk.shape(node)
    if given["leading"]:
        walk.event(node, "selects", [tokens])
    walk.event(
        node, "positions", [tokens], f"{place(node)} deals {walk.atoms.size(tokens)} tokens to {given['count']} rows by their places"
    )
    return [(*batch, *walk.one(node, given["count"], batch)), walk.one(node, shape[1], tokens), width]


TOKEN_RULES: dict[str, Callable[[Walk, Node], Any]] = {
    "match_tokens": match_tokens, "match_above": match_above, "merge_tokens": merge_tokens, "source_map": source_map,
    "follow_map": follow_map, "weigh_tokens": weigh_tokens,
    "class_weights": class_weights, "places_among": places_among, "unmerge_tokens": unmerge_tokens, "match_to_places": match_to_places,
    "assign_tokens": assign_tokens, "merge_by_map": merge_by_map, "unmerge_by_map": unmerge_by_map, "fold_frames": fold_frames,
    "unfold_frames": unfold_frames,
}  # fmt: skip
