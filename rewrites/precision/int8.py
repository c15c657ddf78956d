"""Keep the weights of linears as eight-bit integers with a scale for each 64 numbers of a row.

y = linear(x, W, bias)  ->  y = int8_linear(x, round(W / s), s, bias),  s = max |W| of each 64 of a row / 127

Lossy: weights are rounded to 1/127 of the largest in their group; runtimes that multiply integers round x in the same way, which the held-out data
sees, as it is run there. A quarter of the bytes of weights, which is what a product of few rows waits for, and on processors with eight-bit dot
products several times the rate. The site "model" is every linear, the others are those of each block of the residual stream. What stays: linears of
fewer than LEAST weights; those with a share of groups beyond COARSE in which one number dwarfs the others, which would be rounded away. A weight that
something else reads as well, such as a table of embeddings, stays beside its integers.
Source: Dettmers et al. 2022, arXiv:2208.07339 (with groups in place of its outlier columns).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op
from paretorch.ir.ops.quantized import coarse_share, quantized
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.precision.bf16 import block_of
from paretorch.rewrites.precision.kept import Kept
from paretorch.rewrites.rule import MODEL, Knob, Lossy, Refusal, Rule, Site

NAME = "int8"
LEAST = 256  # weights below which rounding the input costs what it saves
COARSE = 0.02  # of all-MiniLM's linears no group in a thousand is coarse; of a probe on it, with one huge weight in each row, a sixth are

_rounded, _coarse_share = Kept(quantized), Kept(coarse_share)


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream that holds a linear with weights of f32."""
    found = {node.name for node in graph.calls if _weight(graph, node) is not None}
    if not found:
        linears = sum(1 for node in graph.calls if is_op(node, "linear"))
        yield Refusal(
            NAME, MODEL, f"none of its {linears} linears has {LEAST} constant weights in f32 or more, of sizes that go with one another"
        )
        return
    yield Site(MODEL, "everything")
    by_name = {node.name: node for node in graph.nodes}
    for stream in facts.streams:
        for block in stream.blocks:
            if found.intersection(block.nodes):
                yield Site(block.name, origin_of(by_name[block.after]).path)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: "f32" or "int8". Raises PlanError if no linear is left there."""
    if knob != "int8":
        return graph
    graph = graph.copy()
    region = set(graph.calls) if site.name == MODEL else block_of(graph, site)
    chosen = [(node, weight) for node in graph.calls if node in region and (weight := _weight(graph, node)) is not None]
    if not chosen:
        raise PlanError(f"{NAME}: no linear with weights of f32 is left at {site.name}; an earlier rewrite took it out")
    for node, weight in chosen:
        given = arguments(node)
        values, scale = _rounded(weight)
        b, name = Builder(graph, node, origin=origin_of(node), rule=NAME, site=site.name), given["weight"].target
        constants = b.constant(f"{name}_int8", values), b.constant(f"{name}_scale", scale)
        graph.replace(node, b.int8_linear(given["input"], *constants, given["bias"]))
    return graph.clean()


def _weight(graph: Graph, node: Node) -> Tensor | None:
    """The constant f32 weights of a linear if they may be rounded."""
    if not is_op(node, "linear") or node.meta["val"].dtype != torch.float32:
        return None
    held = graph.constant(arguments(node)["weight"])
    if held is None or held.dtype != torch.float32 or held.dim() != 2 or held.numel() < LEAST:
        return None
    return held if held.is_meta or _coarse_share(held) <= COARSE else None


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens, width=16))


RULE = Rule(
    name=NAME, family="precision", effect=Lossy(knob="dtype", values=("f32", "int8")), saves=("bytes", "memory"),
    source="arXiv:2208.07339", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
