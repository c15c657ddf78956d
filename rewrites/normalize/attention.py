"""Raise every spelling of attention to one attention node.

softmax(scale * query . key + masks) . value, however it is written   ->   paretorch.attention(query, key, value, mask, key_bias, scale, band)

A site is a softmax (or its hand-written form) or a call of torch's scaled_dot_product_attention. From the softmax the scores are walked
back to a product of query and key (attention_scores) and the weights forward to their product with the value (attention_softmax); axes are
followed through views (heads), masks are taken apart and joined (masks, masks_join), and the node is written with the fewest views
(attention_emit). Exact up to rounding, with two stated differences: rows that -inf hides altogether give zeros instead of NaN, and a key
hidden by a value at or below -1e4 is not seen at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.errors import ShapeError
from paretorch.ir.graph import Graph, origin_of, tensor_type
from paretorch.ir.ops import aten
from paretorch.ir.types import DTYPES
from paretorch.rewrites.normalize.attention_emit import Emitter
from paretorch.rewrites.normalize.attention_match import Found, match_softmax, match_torch
from paretorch.rewrites.normalize.attention_product import product_of
from paretorch.rewrites.normalize.attention_roles import Roles
from paretorch.rewrites.normalize.attention_softmax import Softmax, Unraised, softmaxes
from paretorch.rewrites.normalize.heads import Dim, Dims, spelled, step_forward
from paretorch.rewrites.normalize.masks import Conditions, Part
from paretorch.rewrites.normalize.masks_join import Chosen, Frame, Joiner, Masks, axes_of
from paretorch.rewrites.normalize.masks_known import Known
from paretorch.rewrites.normalize.masks_terms import Bias
from paretorch.rewrites.normalize.masks_write import condition, joined
from paretorch.rewrites.rule import Refusal


def raise_attention(graph: Graph) -> Graph:
    """The graph with every attention that can be recognised as one attention node."""
    raised = graph.copy().clean()
    raiser = Raiser(raised)
    reasons = [raiser.attempt(site) for site in _sites(raised)]
    if None in reasons:
        _reshape_for_view(raised)
    return raised.clean()


def _reshape_for_view(graph: Graph) -> None:
    """Attention kernels return other strides than a product does, so a view further down may have to copy."""
    for node in graph.calls:
        if spelled(node) in ("view", "_unsafe_view") and node.target is not aten("view.dtype"):
            node.target = aten("reshape.default")


def attention_refusals(graph: Graph) -> list[Refusal]:
    """Why each softmax between two products, or call of torch's attention, that is left in the graph is not an attention node."""
    refused: list[Refusal] = []
    raiser = Raiser(graph.copy())
    for site in _sites(raiser.graph):
        reason = raiser.attempt(site)
        node = site.node if isinstance(site, Softmax) else site
        if reason is not None and (site is node or _between_products(node)):
            refused.append(Refusal("attention", node.name, reason))
    return refused


class Raiser:
    """Matches and rewrites the attentions of one graph, in place, one at a time in the order of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.known, self.emitter = graph, Known(graph), Emitter(graph)
        self.joiner = Joiner(Conditions(self.known))

    def attempt(self, site: Softmax | Node) -> str | None:
        """Raise one site; the reason if that cannot be done."""
        try:
            found = match_softmax(site, self.known) if isinstance(site, Softmax) else match_torch(site, self.known)
            self._write(found, site.node if isinstance(site, Softmax) else site)
        except (Unraised, ShapeError) as refused:
            return str(refused)
        return None

    def _write(self, found: Found, site: Node) -> None:
        pieces = self.joiner.pieces(found.items, found.zeroed)
        roles = found.roles([axes for piece in pieces for axes in axes_of(piece)])
        dtype = found.dtype
        lowest = torch.finfo(DTYPES[dtype]).min
        masks = self.joiner.join(pieces, found.causal, Frame(roles.queries, roles.keys), lowest)
        self.emitter.at(found.node, origin_of(site))
        heads = (*roles.heads, *roles.groups)
        query = self._operand(found, found.query.node, found.query.dims, [roles.batch, heads, roles.queries, found.width])
        key = self._operand(found, found.key.node, found.key.dims, [roles.batch, roles.heads, roles.keys, found.width])
        value = self._operand(found, found.value.node, found.value.dims, [roles.batch, roles.heads, roles.keys, found.value_width])
        for node, dims, divides in found.temperatures:
            heat = self.emitter.cast(self.emitter.arrange(node, dims, [roles.batch, heads, roles.queries, ()], full=False), dtype)
            query = self.emitter.emit(aten("div.Tensor" if divides else "mul.Tensor"), query, heat)
        mask, key_bias = MaskWriter(self.emitter, roles, dtype).write(masks)
        result = self.emitter.emit(torch.ops.paretorch.attention.default, query, key, value, mask, key_bias, **_attributes(found, masks))
        self._put(found, result, [roles.batch, heads, roles.queries, found.value_width])

    def _operand(self, found: Found, node: Node, dims: Dims, groups: Sequence[Dim]) -> Node:
        return self.emitter.cast(self.emitter.arrange(node, dims, groups, full=True), found.dtype)

    def _put(self, found: Found, result: Node, dims: Dims) -> None:
        """Replace the product with the value, or the last of the views that follow it if the result has another order than it."""
        outlet, outlet_dims = found.node, found.dims
        result = self.emitter.cast(result, tensor_type(outlet).dtype)
        if self.emitter.permutes(dims, outlet_dims):
            outlet, outlet_dims = _behind_views(outlet, outlet_dims)
            self.emitter.at(outlet, origin_of(outlet))
        self.graph.replace(outlet, self.emitter.arrange(result, dims, outlet_dims, full=True))


def _behind_views(node: Node, dims: Dims) -> tuple[Node, Dims]:
    """The last of the views, each the only use of the one before."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        moved = step_forward(user, dims) if user.op == "call_function" and user.args and user.args[0] is node else None
        if moved is None:
            break
        node, dims = user, moved
    return node, dims


def _attributes(found: Found, masks: Masks) -> dict[str, Any]:
    """The attributes of the attention node, without those that have their default."""
    band = masks.band
    optional = {"left": (band.left, -1), "right": (band.right, -1), "sinks": (band.sinks, 0), "offset": (band.offset, 0)}
    named: dict[str, Any] = {name: value for name, (value, default) in optional.items() if value != default}
    return {"scale": found.scale, **named, **({"softcap": found.softcap} if found.softcap else {})}


class MaskWriter:
    """Writes the masks of one attention as its two operands."""

    def __init__(self, emitter: Emitter, roles: Roles, dtype: str) -> None:
        self.emitter, self.dtype = emitter, dtype
        self.groups: list[Dim] = [roles.batch, (*roles.heads, *roles.groups), roles.queries, roles.keys]

    def write(self, masks: Masks) -> tuple[Node | None, Node | None]:
        """mask and key_bias. A condition and an added mask are kept apart where one of them depends on batch and key alone."""
        seen = self._seen(masks.seen)
        added = self._sum([node for term in masks.added if (node := self._term(term)) is not None])
        if seen is None or added is None:
            return (seen if seen is not None else added), None
        if self._is_per_key(added):
            return seen, self._key_bias(added)
        if self._is_per_key(seen):
            return added, self._key_bias(self._where(seen, 0.0, float("-inf")))
        return self._where(seen, added, float("-inf")), None

    def _is_per_key(self, node: Node) -> bool:
        sizes = tensor_type(node).shape
        return bool(sizes[1] == 1 and sizes[2] == 1)

    def _key_bias(self, node: Node) -> Node:
        sizes = tensor_type(node).shape
        return self.emitter.viewed(node, [sizes[0], sizes[3]])

    def _seen(self, parts: Sequence[Part]) -> Node | None:
        return joined(self.emitter, [condition(self.emitter, part, self.groups) for part in parts])

    def _sum(self, nodes: Sequence[Node]) -> Node | None:
        total: Node | None = None
        for node in nodes:
            total = node if total is None else self.emitter.emit(aten("add.Tensor"), total, node)
        return total

    def _term(self, term: Bias | Chosen) -> Node | None:
        """An added mask in the type of the attention; None if it adds nothing."""
        if isinstance(term, Bias):
            return self._bias(term)
        inner = self._sum([node for part in term.terms if (node := self._term(part)) is not None])
        if not term.parts:
            return inner
        seen = self._seen(term.parts)
        assert seen is not None  # there are parts
        return self._where(seen, inner if inner is not None else 0.0, max(term.value, self._least(term.value)))

    def _bias(self, bias: Bias) -> Node:
        source = bias.source
        node = self.emitter.constant("bias", source) if isinstance(source, Tensor) else source
        node = self.emitter.arrange(node, bias.dims, self.groups, full=False)
        if bias.factor != 1.0:
            node = self.emitter.emit(aten("mul.Tensor"), node, bias.factor)
        return self.emitter.cast(node, self.dtype)

    def _least(self, value: float) -> float:
        return value if value == float("-inf") else torch.finfo(DTYPES[self.dtype]).min

    def _where(self, seen: Node, kept: Node | float, value: float) -> Node:
        emit = self.emitter.emit
        if isinstance(kept, Node):
            return emit(aten("where.ScalarOther"), seen, kept, value)
        zeros = self.emitter.number(kept, self.dtype)
        return emit(aten("where.ScalarOther"), seen, zeros, value)


def _sites(graph: Graph) -> list[Softmax | Node]:
    """Softmaxes and torch's attentions, in the order of the products that end them."""
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    found: list[Softmax | Node] = [*softmaxes(graph), *(node for node in graph.calls if spelled(node) == "scaled_dot_product_attention")]
    return sorted(found, key=lambda site: order[_end(site.node)] if isinstance(site, Softmax) else order[site])


def _end(node: Node) -> Node:
    """The first product after a softmax, through single uses; the softmax itself if there is none."""
    end = node
    while len(end.users) == 1:
        end = next(iter(end.users))
        if product_of(end) is not None:
            return end
    return node


_SPREADS = 40  # how many nodes around a softmax are looked at


def _between_products(softmax: Node) -> bool:
    """Whether products stand on both sides of a softmax with only cheap ops between."""
    return _reaches(softmax, forward=False) and _reaches(softmax, forward=True)


def _reaches(node: Node, *, forward: bool) -> bool:
    seen, front = {node}, [node]
    while front and len(seen) < _SPREADS:
        here = front.pop(0)
        for other in here.users if forward else here.all_input_nodes:
            if other in seen or other.op != "call_function" or spelled(other) in ("linear", "convolution", "conv2d", "embedding"):
                continue
            if product_of(other) is not None:
                return True
            seen.add(other)
            front.append(other)
    return False
