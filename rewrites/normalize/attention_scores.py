"""The way from a softmax back to the product of query and key: numbers, masks, soft-cap, casts and views on the way.

What is found is  scores = mask items( cap * tanh(scale / cap * query . key) ),  the items listed from the softmax inwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of, tensor_type
from paretorch.ir.types import DTYPES
from paretorch.rewrites.normalize.attention_product import Product, operand_dims, product_of
from paretorch.rewrites.normalize.attention_softmax import Unraised, is_float_cast
from paretorch.rewrites.normalize.heads import (
    Axis,
    Dim,
    Dims,
    Operand,
    aligned,
    flat,
    is_tensor,
    leaves,
    scaled_operand,
    spelled,
    step_back,
    trace,
)
from paretorch.rewrites.normalize.masks_known import Known


@dataclass(frozen=True)
class Added:
    """factor * node is added to the scores."""

    node: Node
    dims: Dims
    factor: float = 1.0


@dataclass(frozen=True)
class Filled:
    """The scores are replaced by a number where the condition is true (hidden) or where it is false."""

    condition: Node
    dims: Dims
    hidden: bool
    value: float


Item = Added | Filled


@dataclass(frozen=True)
class Chain:
    """What lies between the softmax and a value of the scores. items: from the softmax inwards; passed: the nodes on the way;
    factor: the numbers multiplied so far, within the soft-cap once there is one; temperatures: tensors that the scores are multiplied
    by (or divided by, if the flag is set), which do not vary over keys.
    """

    keys: Dim
    items: tuple[Item, ...] = ()
    factor: float = 1.0
    cap: float = 0.0
    temperatures: tuple[tuple[Node, Dims, bool], ...] = ()
    passed: tuple[Node, ...] = ()

    def through(self, *nodes: Node, **changes: Any) -> Chain:
        return replace(self, passed=self.passed + nodes, **changes)


@dataclass(frozen=True)
class Scores:
    """The end of the way. query, key: the product's operands; width: the axes that it sums over."""

    chain: Chain
    product: Product
    query: Operand
    key: Operand
    width: Dim

    @property
    def scale(self) -> float:
        """What query . key is multiplied by, before the soft-cap and its division."""
        inner = self.chain.factor * self.product.alpha * self.query.factor * self.key.factor
        return inner * self.chain.cap if self.chain.cap else inner


class Walk:
    """Walks the scores of one graph."""

    def __init__(self, known: Known) -> None:
        self.known = known

    def back(self, node: Node, dims: Dims, chain: Chain) -> Scores:
        """Walk back from a value of the scores. Raises Unraised with the reason of the way that led furthest."""
        while True:
            product = product_of(node)
            if product is not None:
                return self._end(product, dims, chain)
            moved = step_back(node, dims)
            if moved is not None:
                if not is_tensor(moved[0]):
                    raise Unraised(f"{node.name} does not view a tensor", len(chain.passed))
                chain, (node, dims) = chain.through(node), moved
                continue
            if is_float_cast(node):
                chain, node = chain.through(node), node.args[0]  # type: ignore[assignment]
                continue
            scaled = scaled_operand(node, self.known.number)
            if scaled is not None:
                chain, node = chain.through(node, factor=chain.factor * scaled[1]), scaled[0]
                continue
            return self._branch(node, dims, chain)

    def _branch(self, node: Node, dims: Dims, chain: Chain) -> Scores:
        name, given = spelled(node), node.args
        if name == "tanh":
            return self._tanh(node, dims, chain)
        if name in ("add", "sub", "rsub"):
            return self._sum(node, dims, chain)
        if name in ("mul", "div"):
            return self._temperature(node, dims, chain)
        if name == "masked_fill":
            return self._filled(node, given[0], given[1], True, given[2], dims, chain)
        if name == "where" and len(given) == 3:
            if self.known.uniform(given[2]) is not None:
                return self._filled(node, given[1], given[0], False, given[2], dims, chain)
            return self._filled(node, given[2], given[0], True, given[1], dims, chain)
        what = f"{name} ({node.name})" if name else f"{node.name}, an input or a constant"
        raise Unraised(f"the scores come from {what}; expected a product of query and key, scaled, masked or cast", len(chain.passed))

    def _tanh(self, node: Node, dims: Dims, chain: Chain) -> Scores:
        if chain.cap or chain.factor <= 0.0:
            raise Unraised(
                f"the soft-cap at {node.name} is {chain.factor}, or a second one; one positive number is expected", len(chain.passed)
            )
        return self.back(node.args[0], dims, chain.through(node, cap=chain.factor, factor=1.0))  # type: ignore[arg-type]

    def _sum(self, node: Node, dims: Dims, chain: Chain) -> Scores:
        left, right = node.args[0], node.args[1]
        alpha = arguments(node).get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            raise Unraised(f"{node.name} adds with a weight that is computed", len(chain.passed))
        name = spelled(node)
        signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name]
        ways = [(left, signs[0], right, signs[1]), (right, signs[1], left, signs[0])]
        found: list[Scores] = []
        failures: list[Unraised] = []
        for scores, sign, other, weight in ways:
            if not isinstance(scores, Node) or not is_tensor(scores) or shape_of(scores) != shape_of(node):
                continue
            try:
                onward = self._with_added(node, other, float(weight), dims, chain)
                found.append(self.back(scores, dims, replace(onward, factor=onward.factor * float(sign))))
            except Unraised as failure:
                failures.append(failure)
        if found:
            return min(found, key=lambda scores: len(scores.chain.passed))
        raise max(
            failures, key=lambda failure: failure.depth, default=Unraised(f"{node.name} adds two broadcast values", len(chain.passed))
        )

    def _with_added(self, node: Node, other: Any, weight: float, dims: Dims, chain: Chain) -> Chain:
        if chain.cap:
            raise Unraised(f"{node.name} adds a mask before the soft-cap", len(chain.passed))
        number = self.known.number(other)
        if number is not None and math.isfinite(number):
            return chain.through(node)  # the same for every key: softmax does not see it
        if not is_tensor(other):
            raise Unraised(f"{node.name} adds a number that is computed", len(chain.passed))
        other_dims = aligned(dims, shape_of(other), shape_of(node))
        reductions = self._row_reduction(other, other_dims, chain.keys)
        if reductions is not None:
            return chain.through(node, *reductions)
        return chain.through(node, items=(*chain.items, Added(other, other_dims, weight * chain.factor)))

    def _row_reduction(self, node: Node, dims: Dims, keys: Dim) -> tuple[Node, ...] | None:
        """The nodes of a maximum over the keys, which softmax does not see; None if this is something else."""
        if set(flat(dims)) & set(leaves(keys)) - {axis for axis in leaves(keys) if axis.size == 1}:
            return None
        seen = trace(node, dims)
        source, nodes = seen.node, [*seen.passed, seen.node]
        if spelled(source) == "" and source.args and spelled(source.args[0]) == "max":
            source = source.args[0]  # type: ignore[assignment]
            nodes.append(source)
        return tuple(nodes) if spelled(source) in ("amax", "max", "logsumexp") else None

    def _temperature(self, node: Node, dims: Dims, chain: Chain) -> Scores:
        """A product with a tensor: allowed if it does not vary over keys and nothing further in is shifted by it."""
        if node.kwargs.get("rounding_mode") is not None:
            raise Unraised(f"{node.name} divides the scores with rounding", len(chain.passed))
        left, right = node.args[0], node.args[1]
        ways = [(left, right)] if spelled(node) == "div" else [(left, right), (right, left)]
        failures: list[Unraised] = []
        for scores, other in ways:
            if not is_tensor(scores) or not is_tensor(other) or shape_of(scores) != shape_of(node):  # type: ignore[arg-type]
                continue
            try:
                other_dims = aligned(dims, shape_of(other), shape_of(node))  # type: ignore[arg-type]
                inner = self.back(scores, dims, replace(chain, items=(), passed=(*chain.passed, node)))  # type: ignore[arg-type]
                return self._heated(node, inner, (other, other_dims, spelled(node) == "div"), chain)  # type: ignore[arg-type]
            except Unraised as failure:
                failures.append(failure)
        raise max(
            failures, key=lambda failure: failure.depth, default=Unraised(f"{node.name} scales by a computed number", len(chain.passed))
        )

    def _heated(self, node: Node, inner: Scores, temperature: tuple[Node, Dims, bool], chain: Chain) -> Scores:
        depth = len(inner.chain.passed)
        traced = trace(temperature[0], temperature[1])
        if traced.axes & set(leaves(chain.keys)):
            raise Unraised(f"{node.name} scales the scores by {temperature[0].name}, which depends on the key", depth)
        if any(isinstance(item, Added) for item in inner.chain.items) or (inner.chain.cap and not chain.cap):
            raise Unraised(f"{node.name} scales by {temperature[0].name} what already holds a mask or a soft-cap", depth)
        if any(isinstance(item, Filled) for item in inner.chain.items):
            raise Unraised(f"{node.name} scales scores that are already masked by a tensor, {temperature[0].name}", depth)
        heat = (traced.node, traced.dims, temperature[2])
        return replace(inner, chain=replace(inner.chain, items=chain.items, temperatures=(*inner.chain.temperatures, heat)))

    def _filled(self, node: Node, scores: Any, condition: Any, hidden: bool, value: Any, dims: Dims, chain: Chain) -> Scores:
        number = self.known.uniform(value)
        depth = len(chain.passed)
        if chain.cap:
            raise Unraised(f"{node.name} masks before the soft-cap", depth)
        if number is None or not is_tensor(condition) or not is_tensor(scores) or shape_of(scores) != shape_of(node):
            raise Unraised(f"{node.name} replaces scores by something else than one number", depth)
        filled = number * chain.factor
        filled = -math.inf if filled < torch.finfo(DTYPES[tensor_type(node).dtype]).min else filled
        condition_dims = aligned(dims, shape_of(condition), shape_of(node))
        return self.back(scores, dims, chain.through(node, items=(*chain.items, Filled(condition, condition_dims, hidden, filled))))

    def _end(self, product: Product, dims: Dims, chain: Chain) -> Scores:
        depth = len(chain.passed)
        found = operand_dims(product, dims)
        if found is None:
            raise Unraised(f"{product.node.name} sums over nothing", depth)
        left, right, width = found
        keys = set(leaves(chain.keys))
        in_left, in_right = bool(keys & _set(left)), bool(keys & _set(right))
        if in_left == in_right:
            raise Unraised(f"the softmax at the end of {product.node.name} normalises over an axis that is not the key's alone", depth)
        query, query_dims = (product.right, right) if in_left else (product.left, left)
        key, key_dims = (product.left, left) if in_left else (product.right, right)
        if product.added is not None:
            chain = self._baddbmm_mask(product, dims, chain)
        number = self.known.number
        return Scores(chain.through(product.node), product, trace(query, query_dims, number), trace(key, key_dims, number), width)

    def _baddbmm_mask(self, product: Product, dims: Dims, chain: Chain) -> Chain:
        if chain.cap:
            raise Unraised(f"{product.node.name} adds a mask before the soft-cap", len(chain.passed))
        added: Node = product.added  # type: ignore[assignment]
        added_dims = aligned(dims, shape_of(added), shape_of(product.node))
        return replace(chain, items=(*chain.items, Added(added, added_dims, product.beta * chain.factor)))


def _set(dims: Dims) -> set[Axis]:
    return set(flat(dims))
