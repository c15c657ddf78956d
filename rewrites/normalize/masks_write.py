"""Conditions written out as truths over batch, heads, queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from paretorch.ir.ops import aten
from paretorch.rewrites.normalize.attention_emit import Emitter
from paretorch.rewrites.normalize.heads import Dim
from paretorch.rewrites.normalize.masks import Fixed, Part, Placed


def condition(emitter: Emitter, part: Part, groups: Sequence[Dim]) -> Node:
    """bool: true where the key is seen; groups: the axes of batch, heads, queries and keys. Raises Unraised."""
    if isinstance(part, Placed):
        assert part.condition is not None  # only torch's own causal flag has none, and that is never part of a tensor
        part = part.condition
    if isinstance(part, Fixed):
        return emitter.arrange(emitter.constant("seen", part.tensor), part.dims, groups, full=False)
    node = emitter.cast(part.node, "bool")
    node = emitter.emit(aten("logical_not.default"), node) if part.hidden else node
    return emitter.arrange(node, part.dims, groups, full=False)


def joined(emitter: Emitter, nodes: Sequence[Node]) -> Node | None:
    """True where all of them are; None if there is none."""
    found: Node | None = None
    for node in nodes:
        found = node if found is None else emitter.emit(aten("logical_and.default"), found, node)
    return found
