"""Attend only to near tokens: a key is seen if it is less than a window away.

attention(q, k, v)  ->  local_attention(q, k, v, left=w-1, right=0 if causal, else w-1)

Lossy. Scores and their memory grow with T * w instead of T * T. Positions do not change, so rotary embeddings and tables stay right; padding
masks become a key bias. Computed by blocks: see ir/ops/local_attention.py.
Source: Beltagy et al. 2020, arXiv:2004.05150.
"""

from __future__ import annotations

from collections.abc import Iterator

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.sparse_attention.window import VALUES, narrow, offer

NAME = "sliding_window"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per self-attention over more than twice as many tokens as the smallest window."""
    yield from offer(NAME, graph, facts)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: the window. Raises PlanError."""
    return narrow(NAME, graph, site, knob, 0)


def example(batch: int = 1, tokens: int = 40) -> Graph:
    return transformer(Sizes(batch, tokens, causal=True))


RULE = Rule(
    name=NAME, family="sparse_attention", effect=Lossy(knob="window", values=VALUES), saves=("flops", "bytes"),
    source="arXiv:2004.05150", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"positions"}),
)  # fmt: skip
