"""What rules that fold constants into weights share: reading constants in float64, writing them back in their own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op


def wide(graph: Graph, node: Any) -> Tensor | None:
    """A constant in float64; None for any other node."""
    held = graph.constant(node)
    return held.double() if held is not None and held.dtype.is_floating_point else None


def put(b: Builder, name: str, tensor: Tensor, like: Tensor) -> Node:
    """A new constant in the dtype of `like`. Shared weights are copied, never edited."""
    return b.constant(name, tensor.to(like.dtype).contiguous())


def argument(node: Node, place: int) -> Any:
    """A positional argument, or None."""
    return node.args[place] if len(node.args) > place else None


def through(node: Node, *ops: str) -> Iterator[Node]:
    """Every user of this value, seen through ops that only re-describe it."""
    for user in node.users:
        if is_op(user, *ops):
            yield from through(user, *ops)
        else:
            yield user


def only_user(node: Node) -> Node | None:
    """The one node that uses this value, once; None if there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def is_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)
