"""What the rules that round the weights of linears share: where these are, and what stands in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op
from paretorch.rewrites.precision.blocks import block_of, blocks_with
from paretorch.rewrites.rule import MODEL, Knob, Refusal, Site

LEAST = 256  # weights below which rounding the input costs what it saves

Allowed = Callable[[Tensor], tuple[Knob, ...]]  # weights -> the knob's values, without the identity, at which they may be rounded


def sites(name: str, graph: Graph, facts: Facts, knobs: tuple[Knob, ...], allowed: Allowed, needed: str) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream, with the knob's values at which one of its linears may be rounded.

    knobs: all values of the rule's, the identity first; needed: what weights must have, for the refusal.
    """
    legal = {node: at for node in graph.calls if (held := weight_of(graph, node)) is not None and (at := allowed(held))}
    if not legal:
        linears = sum(1 for node in graph.calls if is_op(node, "linear"))
        yield Refusal(name, MODEL, f"none of its {linears} linears has {LEAST} constant weights in f32 or more, {needed}")
        return

    def values(nodes: list[Node]) -> tuple[Knob, ...] | None:
        found = {value for node in nodes for value in legal.get(node, ())}
        return (knobs[0], *(value for value in knobs if value in found)) if found else None

    yield Site(MODEL, "everything", values(graph.calls))
    yield from blocks_with(graph, facts, values)


def rounded(
    name: str, graph: Graph, site: Site, allowed: Callable[[Tensor], bool], round_: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Graph:
    """The graph with these linears of a site as `<name>_linear`. round_: weights -> (values, scales). Raises PlanError if none is left there."""
    graph = graph.copy()
    region = set(graph.calls) if site.name == MODEL else block_of(graph, site)
    chosen = [
        (node, held) for node in graph.calls if node in region and (held := weight_of(graph, node)) is not None and allowed(held)
    ]  # fmt: skip
    if not chosen:
        raise PlanError(f"{name}: no linear with weights of f32 is left at {site.name}; an earlier rewrite took it out")
    for node, held in chosen:
        given, (values, scale) = arguments(node), round_(held)
        b, weight = Builder(graph, node, origin=origin_of(node), rule=name, site=site.name), given["weight"].target
        constants = b.constant(f"{weight}_{name}", values), b.constant(f"{weight}_scale", scale)
        graph.replace(node, getattr(b, f"{name}_linear")(given["input"], *constants, given["bias"]))
    return graph.clean()


def weight_of(graph: Graph, node: Node) -> Tensor | None:
    """The constant f32 weights of a linear, if there are LEAST or more."""
    if not is_op(node, "linear") or node.meta["val"].dtype != torch.float32:
        return None
    held = graph.constant(arguments(node)["weight"])
    return held if held is not None and held.dtype == torch.float32 and held.dim() == 2 and held.numel() >= LEAST else None
