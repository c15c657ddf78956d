"""Compute a region in bfloat16: weights cast once, values cast at the region's borders.

Lossy: eight bits of mantissa. Halves the bytes of weights and values, and on processors with bf16 products multiplies their rate. Sums inside
products, norms and softmax stay f32, since the kernels keep them so; sizes of tokens and key biases stay f32 in the graph.

The site "model" is everything downstream of the first product; the others are the blocks of the residual stream. Regions that touch share no casts.
Source: Kalamkar et al. 2019, arXiv:1905.12322.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError, ShapeError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import aten, is_op, op_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site

NAME = "bf16"
MODEL = "model"
PRODUCTS = ("matrix", "convolution", "attention")
AS_THEY_ARE = ("match_tokens", "merge_tokens", "source_map", "log_size", "weigh_tokens", "getitem", "to")  # ops that keep f32 beside bf16
KEPT = ("key_bias", "size")  # operands that stay f32
LOWEST = float(torch.finfo(torch.bfloat16).min)

_HALVES = WeakTensorKeyDictionary()


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream that holds a product."""
    region = _reached(graph)
    if not region:
        wide = [node for node in graph.calls if _is_product(node)]
        reason = f"its {len(wide)} products do not compute in f32" if wide else "it has no matrix product, convolution or attention"
        yield Refusal(NAME, MODEL, f"nothing to gain: {reason}")
        return
    yield Site(MODEL, "everything")
    by_name = {node.name: node for node in graph.nodes}
    for stream in facts.streams:
        for block in stream.blocks:
            if any(_is_product(by_name[name]) for name in block.nodes if name in by_name):
                yield Site(block.name, origin_of(by_name[block.after]).path)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: "f32" or "bf16". Raises PlanError if the block is gone or an op of it does not take bf16."""
    if knob != "bf16":
        return graph
    graph = graph.copy()
    region = _reached(graph)
    if site.name != MODEL:
        region = _block(graph, site.name) & region
    if not region:
        raise PlanError(f"{NAME}: no f32 region is named {site.name} here; an earlier rewrite took it out")
    try:
        for node in graph.nodes:
            if node in region:
                _narrow(graph, node, site.name)
        _widen(graph, region, site.name)
    except ShapeError as error:
        raise PlanError(f"{NAME} at {site.name}: {error}") from error
    return graph.clean()


def _is_float(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor) and value.meta["val"].dtype == torch.float32


def _is_product(node: Node) -> bool:
    op = op_of(node)
    return op is not None and op.kind in PRODUCTS and op.name not in AS_THEY_ARE and _is_float(node)


def _reached(graph: Graph) -> set[Node]:
    """Products in f32, and every f32 value computed from one."""
    region: set[Node] = set()
    for node in graph.calls:
        downstream = any(argument in region for argument in node.all_input_nodes)
        several = isinstance(node.meta.get("val"), (tuple, list)) and downstream
        if _is_product(node) or (downstream and _is_float(node)) or several:
            region.add(node)
    return region


def _block(graph: Graph, name: str) -> set[Node]:
    """The nodes between the two stream values that a block's name holds: "before->after". Empty if one of them is gone."""
    first, _, last = name.partition("->")
    before, after = graph.node(first), graph.node(last)
    if before is None or after is None:
        return set()
    below = _closure(before, lambda node: node.users)
    return {node for node in _closure(after, lambda node: node.all_input_nodes) & below if node.op == "call_function"} | {after}


def _closure(start: Node, step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Everything that `step` reaches from a node, without the node."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        for node in step(waiting.pop()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def _narrow(graph: Graph, node: Node, site: str) -> None:
    """Cast the f32 operands of one node, and compute its type anew."""
    if not is_op(node, *AS_THEY_ARE):
        names = {id(value): name for name, value in arguments(node).items() if isinstance(value, Node)}
        cast = {arg: _half(graph, arg, node, site) for arg in node.all_input_nodes if _is_float(arg) and names.get(id(arg)) not in KEPT}
        for arg, half in cast.items():
            node.replace_input_with(arg, half)
    node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))


def _half(graph: Graph, value: Node, before: Node, site: str) -> Node:
    """The value in bf16: a constant cast once, the source of a cast that only widened it, or a cast just before its first use."""
    b = Builder(graph, before, origin=origin_of(before), rule=NAME, site=site)
    held = graph.constant(value)
    if held is not None:
        if held not in _HALVES:
            _HALVES[held] = held.clamp_min(LOWEST).to(torch.bfloat16)
        return b.constant(f"{value.target}_bf16", _HALVES[held])
    source = value.args[0] if is_op(value, "to") else None
    if isinstance(source, Node) and isinstance(source.meta.get("val"), Tensor) and source.meta["val"].dtype == torch.bfloat16:
        return source
    made = next((user for user in value.users if is_op(user, "to") and user.meta.get("rule") == NAME and user < before), None)
    if made is not None and made.meta["val"].dtype == torch.bfloat16:
        return made
    is_mask = arguments(before).get("mask") is value
    return b.call(aten("to.dtype"), (b.clamp(value, LOWEST) if is_mask else value, torch.bfloat16))


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


def _takes_half(user: Node) -> bool:
    """A cast to bf16 that a neighbouring region put there."""
    return is_op(user, "to") and user.meta.get("rule") == NAME


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="precision", effect=Lossy(knob="dtype", values=("f32", "bf16")), saves=("bytes", "memory"),
    source="arXiv:1905.12322", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
