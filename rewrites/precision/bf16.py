"""Compute a region in bfloat16: weights cast once, values cast at the region's borders.

Lossy: eight bits of mantissa. Halves the bytes of weights and values, and on processors with bf16 products multiplies their rate. Sums inside
products, norms and softmax stay f32, since the kernels keep them so; sizes of tokens and key biases stay f32 in the graph.

The site "model" is everything downstream of the first product; the others are the blocks of the residual stream, or where there is none the regions
that ops without a row separate. Regions that touch share no casts. What feeds the products (integers, positions, angles of a rotary embedding, which
are outer products) stays as it is, and so do opaque ops. Finite numbers beyond bf16's range, as in masks, are held at its ends, since -inf in a row
of nothing else is NaN.
Source: Kalamkar et al. 2019, arXiv:1905.12322.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError, ShapeError
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import TOKEN_OPS, aten, is_op, op_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.precision.blocks import block_of, blocks_with, closure
from paretorch.rewrites.precision.kept import Kept
from paretorch.rewrites.rule import MODEL, SPAN, Knob, Lossy, Refusal, Rule, Site

NAME = "bf16"
PRODUCTS = ("matrix", "convolution", "attention")
AS_THEY_ARE = (*TOKEN_OPS, "getitem", "to")  # ops that keep f32 beside bf16
KEPT = ("key_bias", "size", "scale")  # operands that stay f32
LOWEST = float(torch.finfo(torch.bfloat16).min)


@Kept
def _halved(held: Tensor) -> Tensor:
    return torch.where(held.isinf(), held, held.clamp(LOWEST, -LOWEST)).to(torch.bfloat16)


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream that holds a product."""
    region = _reached(graph)
    if not region:
        wide = [node for node in graph.calls if _has_kind(node, *PRODUCTS)]
        reason = f"its {len(wide)} products do not compute in f32" if wide else "it has no matrix product, convolution or attention"
        yield Refusal(NAME, MODEL, f"nothing to gain: {reason}")
        return
    yield Site(MODEL, "everything")
    yield from blocks_with(graph, facts, lambda nodes: RULE.knobs if any(map(_is_product, nodes)) else None)
    parts = _parts(region) if not any(stream.blocks for stream in facts.streams) else []
    if len(parts) > 1:
        for part in parts:
            yield Site(f"{part[0].name}{SPAN}{part[-1].name}", origin_of(part[0]).path)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: "f32" or "bf16". Raises PlanError if the block is gone or an op of it does not take bf16."""
    if knob != "bf16":
        return graph
    graph = graph.copy()
    region = _reached(graph)
    if SPAN in site.name:
        region = next((set(part) for part in _parts(region) if part[0].name == site.parts[0]), set())
    elif site.name != MODEL:
        region = block_of(graph, site) & region
    if not region:
        raise PlanError(f"{NAME}: no f32 region is named {site.name} here; an earlier rewrite took it out")
    region |= _between(graph, region)
    try:
        for node in graph.nodes:
            if node in region:
                _narrow(graph, node, site.name)
        _widen(graph, region, site.name)
    except ShapeError as error:
        raise PlanError(f"{NAME} at {site.name}: {error}") from error
    return _without_idle_casts(graph)


def _is_float(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor) and value.meta["val"].dtype == torch.float32


def _is_product(node: Node) -> bool:
    """A product worth computing in fewer bits; one along an axis of length one only spreads values."""
    op = op_of(node)
    if op is None or op.kind not in PRODUCTS or op.name in AS_THEY_ARE or not _is_float(node):
        return False
    elements = tensor_type(node).numel
    return op.kind != "matrix" or op.flops(node) not in (elements, 2 * elements)


def _reached(graph: Graph) -> set[Node]:
    """Products in f32, and every f32 value that ops with a row compute from one."""
    region: set[Node] = set()
    for node in graph.calls:
        downstream = op_of(node) is not None and any(argument in region for argument in node.all_input_nodes)
        several = isinstance(node.meta.get("val"), (tuple, list)) and downstream
        if _is_product(node) or (downstream and _is_float(node)) or several:
            region.add(node)
    return region


def _between(graph: Graph, region: set[Node]) -> set[Node]:
    """What stands alone between this region and another that was narrowed before: the norm at the border of two blocks."""
    found: set[Node] = set()
    for node in graph.calls:
        given = [argument for argument in node.all_input_nodes if _is_float(argument) and argument.op != "get_attr"]
        from_half = bool(given) and all(argument in region or _half_source(argument) is not None for argument in given)
        to_half = all(user in region or _takes_half(user) for user in node.users)
        if from_half and to_half and op_of(node) is not None and _is_float(node) and not is_op(node, *AS_THEY_ARE):
            found.add(node)
    return found


def _parts(region: set[Node]) -> list[list[Node]]:
    """The connected parts of a region that hold a product, each in order of the graph."""
    part_of: dict[Node, list[Node]] = {}
    for node in sorted(region):
        joined = [node]
        for part in {id(part_of[argument]): part_of[argument] for argument in node.all_input_nodes if argument in part_of}.values():
            joined = part + joined
        for member in joined:
            part_of[member] = joined
    parts = {id(part): sorted(part) for part in part_of.values()}.values()
    return sorted((part for part in parts if any(_is_product(node) for node in part)), key=lambda part: part[0])


def _narrow(graph: Graph, node: Node, site: str) -> None:
    """Cast the f32 operands of one node, and compute its type anew."""
    if not is_op(node, *AS_THEY_ARE):
        names = {id(value): name for name, value in arguments(node).items() if isinstance(value, Node)}
        cast = {arg: _half(graph, arg, node, site) for arg in node.all_input_nodes if _is_float(arg) and names.get(id(arg)) not in KEPT}
        for arg, half in cast.items():
            node.replace_input_with(arg, half)
        node.args, node.kwargs = torch.utils._pytree.tree_map_only(float, _in_range, (node.args, dict(node.kwargs)))
    node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))


def _half(graph: Graph, value: Node, before: Node, site: str) -> Node:
    """The value in bf16: a constant cast once, the source of a cast that only widened it, or a cast just before its first use."""
    b = Builder(graph, before, origin=origin_of(before), rule=NAME, site=site)
    held = graph.constant(value)
    if held is not None:
        return b.constant(f"{value.target}_bf16", _halved(held))
    source = _half_source(value)
    if source is not None:
        return source
    made = next((user for user in value.users if is_op(user, "to") and user.meta.get("rule") == NAME and user < before), None)
    if made is not None and made.meta["val"].dtype == torch.bfloat16:
        return made
    return b.call(aten("to.dtype"), (b.clamp(value, LOWEST) if _may_overflow(value, before) else value, torch.bfloat16))


def _half_source(value: Node) -> Node | None:
    """The bf16 value that this one is the wide copy of."""
    source = value.args[0] if is_op(value, "to") else None
    known = isinstance(source, Node) and isinstance(source.meta.get("val"), Tensor) and source.meta["val"].dtype == torch.bfloat16
    return source if known else None  # type: ignore[return-value]


def _in_range(number: float) -> float:
    """The number, or where bf16 has no finite one of that size the end of its range."""
    return number if math.isinf(number) else max(LOWEST, min(number, -LOWEST))


def _may_overflow(value: Node, user: Node) -> bool:
    """Whether numbers below bf16's range were written into this value, or a mask may bring them in as an input."""
    sources = {value, *closure(value, lambda node: () if _has_kind(node, *PRODUCTS) else node.all_input_nodes)}
    numbers = [n for node in sources for n in torch.utils._pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, float)]
    if any(n < LOWEST and not math.isinf(n) for n in numbers):
        return True
    given = any(node.op == "placeholder" and _is_float(node) for node in sources)
    return given and not any(n == -math.inf for n in numbers) and (arguments(user).get("mask") is value or _reaches_softmax(user))


def _reaches_softmax(node: Node) -> bool:
    """Whether a softmax reads this value, or one that pointwise ops and views alone compute from it."""
    reached = {node, *closure(node, lambda n: n.users if _has_kind(n, "elementwise", "view") else ())}
    return any(is_op(n, "softmax", "log_softmax") for n in reached)


def _has_kind(node: Node, *kinds: str) -> bool:
    op = op_of(node)
    return op is not None and op.kind in kinds


def _widen(graph: Graph, region: set[Node], site: str) -> None:
    """Give f32 back to every user outside of the region that was promised it."""
    for node in [n for n in graph.nodes if n in region]:
        value = node.meta["val"]
        outside = [user for user in node.users if user not in region and not _takes_half(user)]
        if not isinstance(value, Tensor) or value.dtype != torch.bfloat16 or not outside:
            continue
        with graph.fx.inserting_after(node):
            wide = graph.fx.create_node("call_function", aten("to.dtype"), (node, torch.float32), name=f"{node.name}_wide")
        wide.meta.update(val=graph.evaluate(wide.target, wide.args, {}), origin=origin_of(node), rule=NAME, site=site)
        for user in outside:
            user.replace_input_with(node, wide)


def _without_idle_casts(graph: Graph) -> Graph:
    """Casts of a neighbouring region whose source has become what they make are gone."""
    for node in graph.calls:
        if _takes_half(node) and node.args[0].meta["val"].dtype == node.meta["val"].dtype:  # type: ignore[union-attr]
            graph.replace(node, node.args[0])  # type: ignore[arg-type]
    return graph.clean()


def _takes_half(user: Node) -> bool:
    """A cast to bf16 that a region put there."""
    return is_op(user, "to") and user.meta.get("rule") == NAME and user.meta["val"].dtype == torch.bfloat16


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="precision", effect=Lossy(knob="dtype", values=("f32", "bf16")), saves=("bytes", "memory"),
    source="arXiv:1905.12322", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
