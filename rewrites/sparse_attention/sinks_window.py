"""Attend to near tokens and to the first four, which models use as a place to put attention that goes nowhere.

attention(q, k, v)  ->  local_attention(q, k, v, left=w-1, right=0 if causal, else w-1, sinks=4)

Lossy, mostly far less so than the window alone: without the first tokens a causal model breaks down. Also keeps a class token in view.
Source: Xiao et al. 2024, arXiv:2309.17453.
"""

from __future__ import annotations

from collections.abc import Iterator

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.sparse_attention.window import SINKS, VALUES, narrow, offer

NAME = "sinks_window"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per self-attention over more than twice as many tokens as the smallest window."""
    yield from offer(NAME, graph, facts)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: the window. Raises PlanError."""
    return narrow(NAME, graph, site, knob, SINKS)


def example(batch: int = 1, tokens: int = 40) -> Graph:
    return transformer(Sizes(batch, tokens, causal=True))


RULE = Rule(
    name=NAME, family="sparse_attention", effect=Lossy(knob="window", values=VALUES), saves=("flops", "bytes"),
    source="arXiv:2309.17453", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"positions"}),
)  # fmt: skip
