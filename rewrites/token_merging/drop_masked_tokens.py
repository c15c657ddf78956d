"""Drop the tokens that a learned mask of the model hides, instead of computing with them and hiding them.

score = a number for each token, computed from its row; every later attention adds a mask made of the score to its keys
x                                ->  x = keep_tokens(x, the K tokens of largest weight)          before the first attention that has the mask

Models that are trained to drop tokens (MrT5's gate, DynamicViT's policy) hide them softly while they are trained, and as captured still work
on all of them. Masks, tables of positions and biases of pairs of places are looked up at the tokens that stay. K is fixed: the knob is K as a
share of the tokens, and tokens that stay although the mask hides them stay hidden. Exact where no token that is dropped had any
weight: where K is at least what the data need, which `capacity` finds. Below that, and for soft masks, it is lossy and its loss is measured.
Legal where every attention and every sum over these tokens behind that place has the mask or weights made of the same score.
The quality of trained models: not measured, as no such model is at hand.
Source: Kallini et al. 2024, arXiv:2410.20771; Rao et al. 2021, arXiv:2106.02034.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from math import ceil, exp, prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import AxisFacts, Facts, TokenAxis, Use, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import ParetorchError, PlanError
from paretorch.ir.graph import Graph, arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op, op_of
from paretorch.ir.ops.tokens import is_reduction
from paretorch.ir.types import DTYPES
from paretorch.rewrites.example_models import Sizes, gated_transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs, per_key
from paretorch.rewrites.token_merging.gathered import Cut, drop_at, find_cut
from paretorch.rewrites.token_merging.place import batch_of, end_of_block, named, parts_of
from paretorch.rewrites.token_merging.selections import lineage

NAME = "drop_masked_tokens"
CAPACITIES: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
LEAST = exp(-15.0)  # of the largest weight: what counts as hidden; half of the -30 that MrT5's gate adds at most
PRODUCTS = ("linear", "matmul", "addmm", "attention", "spatial")
ROUTES = ("pointwise", "view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "select", "slice", "cat", "reduce", "weigh_tokens")


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The first attention that has a learned mask, for each such mask."""
    for axis in facts.axes.tokens:
        known: set[frozenset[Node]] = set()
        for name in axis.mixers:
            mixer = _node(graph, name)
            scores = learned_scores(graph, facts.axes, axis, mixer)
            if not scores or scores in known:
                continue
            known.add(scores)
            cut = _cut(graph, facts, axis, mixer, scores)
            fault = cut if isinstance(cut, str) else _fault(graph, Site(name))
            if fault:
                yield Refusal(NAME, name, fault)
            else:
                yield Site(name, origin_of(mixer).path or name, CAPACITIES)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """The graph with as many tokens as the knob says from the site on. Raises PlanError if the site is gone or not legal."""
    share = float(knob or 0)
    if share >= 1.0:
        return graph
    graph = graph.copy()
    facts = analyze(graph)
    axis = next((axis for axis in facts.axes.tokens if site.name in axis.mixers), None)
    if axis is None:
        raise PlanError(f"{NAME}: no self-attention is named {site.name} here; an earlier rewrite took it out or changed it")
    mixer = _node(graph, site.name)
    scores = learned_scores(graph, facts.axes, axis, mixer)
    cut = _cut(graph, facts, axis, mixer, scores) if scores else f"the mask of {named(mixer)} is no score of its tokens"
    if isinstance(cut, str):
        raise PlanError(f"{NAME} at {site.name}: {cut}")
    gone = _count(graph, facts.axes, axis, share, cut.protected)
    if gone <= 0:
        return graph

    def choose(b: Builder) -> Node:
        return b.item(b.match_by_weight(weight_of_keys(b, mixer), None, gone, cut.protected), 0)

    return drop_at(graph, facts.axes, cut, mixer, NAME, _masks(mixer), choose)


def capacity(graph: Graph, site: Site, batches: Iterable[Sequence[Tensor]], multiple: int = 8) -> float:
    """The smallest knob with which no token that counts is dropped on these inputs, each a flat tuple of the graph's.

    A token counts if its key keeps more than exp(-15) of the largest weight. multiple: the number of tokens is rounded up to one.
    """
    graph = graph.copy()
    mixer = _node(graph, site.name)
    weight = weight_of_keys(Builder(graph, graph.output_node), mixer)
    added = is_op(weight, "add") or weight in _masks(mixer) or not is_op(weight, "mul", "sum")
    graph.set_outputs([weight])
    graph.clean()
    tokens, most = int(shape_of(weight)[1]), 1
    for inputs in batches:
        found = graph.run(*inputs)[0].double()
        found = (found - found.amax(1, keepdim=True)).exp() if added else found
        most = max(most, int((found > LEAST * found.amax(1, keepdim=True)).sum(1).max()))
    return min(1.0, -(-most // multiple) * multiple / tokens)


def weight_of_keys(b: Builder, mixer: Node) -> Node:
    """T[B,T]: what the masks of an attention leave of each key, larger for those that are seen; for masks by pairs summed over heads and queries."""
    given, added, factors = arguments(mixer), [], []
    for mask in _masks(mixer):
        wide = b.call(aten("_to_copy.default"), (mask,), {"dtype": torch.float32}) if _is_bool(mask) else mask
        if mask is given["key_bias"]:
            added.append(wide)
        elif mask_by_pairs(mixer):
            factors.append(b.sum(wide if _is_bool(mask) else b.exp(wide), [1, 2]))
        else:
            (factors if _is_bool(mask) else added).append(per_key(b, wide, shape_of(given["key"])[-2]))
    if factors:
        return reduce(b.mul, [*factors, *(b.exp(part) for part in added)])
    return reduce(b.add, added)


def learned_scores(graph: Graph, axes: AxisFacts, axis: TokenAxis, mixer: Node) -> frozenset[Node]:
    """The numbers, one for each token and computed from its row, of which this attention's masks are made; none if they are made otherwise."""
    found: set[Node] = set()
    for mask in _masks(mixer):
        scores = _scores_of(graph, axes, axis, mask, batch_of(axes, mixer))
        if scores is None:
            return frozenset()
        found |= scores
    return frozenset(found)


def _scores_of(graph: Graph, axes: AxisFacts, axis: TokenAxis, mask: Node, batch: Sequence[Any]) -> set[Node] | None:
    """The first numbers of a mask that come from rows; None if it is not made of numbers for each token alone."""
    learned, found, todo, seen = _learned(graph), set(), [mask], set()
    while todo:
        node = todo.pop()
        if node in seen or node not in learned:
            continue  # padding, positions
        seen.add(node)
        before = _before(node, learned)
        number = _is_number(graph, axes, axis, node, batch)
        if number and not (_passes(node) and all(_is_number(graph, axes, axis, argument, batch) for argument in before)):
            found.add(node)
        elif _passes(node):
            todo += before
        else:
            return None
    return found


def _masks(mixer: Node) -> list[Node]:
    """What an attention adds to its scores and is not the same in each call."""
    if not is_op(mixer, "attention"):
        return []
    given = arguments(mixer)
    return [mask for mask in (given["mask"], given["key_bias"]) if mask is not None and mask.op != "get_attr"]


def _is_bool(mask: Node) -> bool:
    return DTYPES[tensor_type(mask).dtype] == torch.bool


def _passes(node: Node) -> bool:
    """Whether a node hands numbers on: entry by entry, laid out otherwise, or looked up at the tokens that an earlier step left."""
    op = op_of(node)
    return (op is not None and op.axes in ROUTES) or is_reduction(node) or is_op(node, "embedding") or node.target is operator.getitem


def _before(node: Node, learned: set[Node]) -> list[Node]:
    """What a node hands on, as far as it is learned."""
    given = node.all_input_nodes[:1] if is_reduction(node) or is_op(node, "embedding") else node.all_input_nodes
    return [argument for argument in given if argument in learned]


def _entries(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node, batch: Sequence[Any]) -> int:
    """How many numbers a value has for each token of each sample; 0 if it has not the tokens in one dimension, or they meet in two."""
    maps, whole = axes.maps.get(node.name, ()), lineage(graph, axes, axis.atom)
    mine = [len(atoms) == 1 and any(parts_of(axes, graph, atoms[0], older) is not None for older in whole) for atoms in maps]
    rest = [
        size for size, own, atoms in zip(shape_of(node), mine, maps, strict=True) if not own and not (atoms and set(atoms) <= set(batch))
    ]
    return int(prod(rest)) if mine.count(True) == 1 and all(isinstance(size, int) for size in rest) else 0


def _is_number(graph: Graph, axes: AxisFacts, axis: TokenAxis, node: Node, batch: Sequence[Any]) -> bool:
    node = node.args[0] if is_reduction(node) else node  # type: ignore[assignment]
    return bool(axes.maps.get(node.name)) and _entries(graph, axes, axis, node, batch) == 1


def _learned(graph: Graph) -> set[Node]:
    """What comes out of some product with weights: scores, as against a padding mask that was given."""
    found: set[Node] = set()
    for node in graph.calls:
        op = op_of(node)
        follows = any(argument in found for argument in node.all_input_nodes)
        axes = op.axes if op is not None else None
        if axes != "create" and (follows or axes in PRODUCTS):  # ones_like and its like do not look at the values
            found.add(node)
    return found


def _reaches(scores: frozenset[Node], *nodes: Any) -> bool:
    """Whether masks or weights are made of all these scores, directly or by the sizes of tokens that were merged."""
    todo, seen = [node for node in nodes if isinstance(node, Node)], set()
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += current.all_input_nodes if _passes(current) and current not in scores else []
    return scores <= seen


def _sight(graph: Graph, axes: AxisFacts, axis: TokenAxis, scores: frozenset[Node]) -> Callable[[Node, Use], str | None]:
    """What would still see a token that the scores hide, as a sentence."""

    def sees(node: Node, use: Use) -> str | None:
        if use.kind == "mixes":
            if not is_op(node, "attention"):
                return f"{named(node)} mixes tokens by {node.target}, not as one attention with the learned mask"
            given = arguments(node)
            key = axes.maps.get(given["key"].name, ((), ()))[-2]
            ours = len(key) == 1 and parts_of(axes, graph, key[0], axis.atom) is not None
            hidden = not ours or _reaches(scores, given["mask"], given["key_bias"])
            return None if hidden else f"{named(node)} sees the tokens without the learned mask, also those that it hides"
        x: Any = node.args[0]
        weights = x.all_input_nodes if is_op(x, "mul", "weigh_tokens") else [x]
        numbers = [weight for weight in weights if weight.name in axes.maps and _reaches(scores, weight)]
        if is_op(node, "sum") and numbers:
            return None
        return f"{named(node)} is {node.target} over the tokens without weights made of the learned mask, so it counts those that it hides"

    return sees


def _cut(graph: Graph, facts: Facts, axis: TokenAxis, mixer: Node, scores: frozenset[Node]) -> Cut | str:
    """Tokens are dropped where the block of this attention begins."""
    nodes = {node.name: node for node in graph.nodes}
    after = end_of_block(facts, nodes, mixer)
    blocks = (block for stream in facts.streams for block in stream.blocks)
    before = next((block.before for block in blocks if after is not None and block.after == after.name), None)
    if before is None:
        return f"{named(mixer)} stands in no block of a residual stream, so there is no one value that carries the tokens on"
    sight = _sight(graph, facts.axes, axis, scores)
    found = find_cut(graph, facts.axes, axis, nodes[before], batch_of(facts.axes, mixer), _masks(mixer), sight)
    if isinstance(found, Cut) and mixer not in found.after:
        return f"{named(mixer)} is computed from {before} only by way of the mask"
    return found


def _count(graph: Graph, axes: AxisFacts, axis: TokenAxis, share: float, protected: int) -> int:
    """How many tokens go: the capacity is a share of those that the model begins with."""
    whole = int(lineage(graph, axes, axis.atom)[-1].size)
    return int(axis.atom.size) - max(ceil(share * whole - 1e-9), protected + 1)


def _fault(graph: Graph, site: Site) -> str | None:
    """What goes wrong when the weakest step is tried; None if nothing does."""
    try:
        rewrite(graph, site, CAPACITIES[1])
    except ParetorchError as error:
        return str(error)
    return None


def _node(graph: Graph, name: str) -> Node:
    found = graph.node(name)
    if found is None:
        raise PlanError(f"{NAME}: no node is named {name} here; an earlier rewrite took it out or changed it")
    return found


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return gated_transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="capacity", values=CAPACITIES), saves=("flops", "bytes", "memory"),
    source="arXiv:2410.20771", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
