"""Softmax in its spellings, and the way of its result to the product with the value.

softmax(x), exp(x) / sum(exp(x)), exp(x) * reciprocal(sum(exp(x))), exp(x - logsumexp(x)), exp(log_softmax(x)); a maximum that is
subtracted from x first is a mask without effect and is dealt with where the scores are walked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import Graph, arguments, shape_of, tensor_type
from paretorch.rewrites.normalize.attention_product import Product, Weighted, product_of, weighted_by
from paretorch.rewrites.normalize.heads import Dim, Dims, fresh, is_tensor, same_elements, spelled, step_forward
from paretorch.rewrites.normalize.masks_known import Known

FLOATS = ("f64", "f32", "f16", "bf16")


class Unraised(Exception):
    """A softmax that does not become an attention node; says why. depth: how many nodes had fitted."""

    def __init__(self, reason: str, depth: int = 0) -> None:
        super().__init__(reason)
        self.depth = depth


@dataclass(frozen=True)
class Softmax:
    """node: the weights; scores: what they are the softmax of, over dimension `dim`; inner: nodes that only serve the softmax."""

    node: Node
    scores: Node
    dim: int
    inner: tuple[Node, ...] = ()


def softmaxes(graph: Graph) -> list[Softmax]:
    """All softmaxes of a graph in order."""
    return [found for node in graph.calls if (found := _softmax(node)) is not None]


def _softmax(node: Node) -> Softmax | None:
    name = spelled(node)
    if name in ("softmax", "_softmax", "special_softmax", "_safe_softmax"):
        found = arguments(node)
        return _over(node, found["self"], found["dim"])
    if name == "div":
        return _quotient(node, node.args[0], node.args[1])
    if name == "mul":
        for x, y in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if spelled(y) == "reciprocal" or (spelled(y) == "pow" and y.args[1] == -1):  # type: ignore[union-attr]
                return _quotient(node, x, y.args[0], (y,))  # type: ignore[union-attr,arg-type]
    if name == "exp" and spelled(node.args[0]) in ("log_softmax", "_log_softmax"):
        inner: Node = node.args[0]  # type: ignore[assignment]
        found = arguments(inner)
        return _over(node, found["self"], found["dim"], (inner,))
    if name == "exp" and spelled(node.args[0]) == "sub":
        return _less_logsumexp(node, node.args[0])  # type: ignore[arg-type]
    return None


def _over(node: Node, scores: Any, dim: Any, inner: tuple[Node, ...] = ()) -> Softmax | None:
    fits = isinstance(dim, int) and is_tensor(scores) and len(shape_of(scores)) > 0
    return Softmax(node, scores, dim % len(shape_of(scores)), inner) if fits else None


def _quotient(node: Node, exponential: Any, total: Any, inner: tuple[Node, ...] = ()) -> Softmax | None:
    """exp(x) over its sum along one dimension."""
    summed, between = _reduced(total, "sum")
    if summed is None:
        return None
    dim, powers = _one_dim(summed), summed.args[0]
    above, above_passed = _plain(exponential)
    below, below_passed = _plain(powers)
    if dim is None or spelled(above) != "exp" or spelled(below) != "exp" or above.args[0] is not below.args[0]:
        return None
    nodes = (*inner, *between, summed, *above_passed, *below_passed, above, *((below,) if below is not above else ()))
    return _over(node, above.args[0], dim, nodes)


def _plain(node: Any) -> tuple[Any, tuple[Node, ...]]:
    """What is behind copies and casts between float types."""
    passed: list[Node] = []
    while isinstance(node, Node):
        behind = same_elements(node) or (node.args[0] if is_float_cast(node) else None)
        if not isinstance(behind, Node):
            break
        passed.append(node)
        node = behind
    return node, tuple(passed)


def _less_logsumexp(node: Node, difference: Node) -> Softmax | None:
    total, between = _reduced(difference.args[1], "logsumexp")
    if total is None or total.args[0] is not difference.args[0]:
        return None
    dim = _one_dim(total)
    return _over(node, total.args[0], dim, (difference, *between, total)) if dim is not None else None


def _reduced(node: Any, name: str) -> tuple[Node | None, tuple[Node, ...]]:
    """The reduction that keeps its dimension (or gets it back by unsqueeze) behind copies, and the nodes on the way."""
    node, passed = _plain(node)
    restored = None
    if spelled(node) == "unsqueeze":
        restored, passed = node, (*passed, node)
        node, more = _plain(node.args[0])
        passed = (*passed, *more)
    if spelled(node) != name or _one_dim(node) is None:
        return None, ()
    keeps = bool(arguments(node).get("keepdim"))
    if keeps == (restored is not None):
        return None, ()
    if restored is not None and restored.args[1] % len(shape_of(restored)) != _one_dim(node):
        return None, ()
    return node, passed


def _one_dim(node: Node) -> int | None:
    dims = arguments(node).get("dim")
    if isinstance(dims, (list, tuple)) and len(dims) == 1:
        dims = dims[0]
    return dims % len(shape_of(node.args[0])) if isinstance(dims, int) else None  # type: ignore[arg-type]


def is_float_cast(node: Node) -> bool:
    """Whether this only changes one float type to another."""
    if spelled(node) not in ("_to_copy", "to", "type_as") or not is_tensor(node.args[0]):
        return False
    return tensor_type(node).dtype in FLOATS and tensor_type(node.args[0]).dtype in FLOATS  # type: ignore[arg-type]


@dataclass
class Weights:
    """The way of the weights to the value. zeroed: conditions under which weights were set to zero after the softmax, with
    their dimensions and whether the condition is true where they were kept.
    """

    weighted: Weighted
    score_dims: Dims
    keys: Dim
    inner: list[Node] = field(default_factory=list)
    zeroed: list[tuple[Node, bool]] = field(default_factory=list)


def follow(softmax: Softmax, known: Known) -> Weights:
    """Walk from the softmax to the one product that uses it. Raises Unraised with the reason if there is none."""
    dims = fresh(softmax.node)
    score_dims, keys = list(dims), dims[softmax.dim]
    inner = list(softmax.inner)
    zeroed: list[Any] = []
    node = softmax.node
    while True:
        users = list(node.users)
        if len(users) != 1:
            names = ", ".join(user.name for user in users)
            raise Unraised(f"the attention weights {node.name} are used by {names}; one product with a value is expected" if users
                           else f"nothing uses the attention weights {node.name}")  # fmt: skip
        user = users[0]
        product = product_of(user)
        if product is not None:
            weighted = _weighted(product, node, dims, keys)
            return Weights(weighted, score_dims, keys, [*inner, node], zeroed)
        onward = _onward(user, node, dims, zeroed, known)
        if onward is None:
            raise Unraised(f"the attention weights go through {spelled(user) or user.op} ({user.name}) before the product with a value")
        inner.append(node)
        node, dims = user, onward


def _weighted(product: Product, weights: Node, dims: Dims, keys: Dim) -> Weighted:
    if weights not in (product.left, product.right):
        raise Unraised(f"{product.node.name} adds the attention weights to a product")
    found = weighted_by(product, weights, dims, keys)
    if isinstance(found, str):
        raise Unraised(found)
    return found


def _onward(user: Node, node: Node, dims: Dims, zeroed: list[tuple[Node, bool]], known: Known) -> Dims | None:
    """The dimensions after one op between softmax and product; None if the op changes the weights."""
    moved = step_forward(user, dims) if user.args and user.args[0] is node else None
    if moved is not None or is_float_cast(user):
        return moved if moved is not None else dims
    name, given = spelled(user), user.args
    if name == "nan_to_num" and arguments(user).get("nan") in (None, 0, 0.0):
        return dims
    if name == "masked_fill" and given[0] is node and known.number(given[2]) == 0.0:
        zeroed.append((given[1], False))  # type: ignore[arg-type]
        return dims
    if name == "where" and given[1] is node and known.uniform(given[2]) == 0.0:
        zeroed.append((given[0], True))  # type: ignore[arg-type]
        return dims
    if name == "where" and given[2] is node and known.uniform(given[1]) == 0.0:
        zeroed.append((given[0], False))  # type: ignore[arg-type]
        return dims
    return None
