"""Skip one feed-forward block; the rest of its layer stays.

x + feed_forward(norm(x)) -> x   (post-norm: norm(x + feed_forward(x)) -> x)

Lossy. Saves usually two thirds of the operations and weights of a layer. A block of which a value is used
elsewhere stays.
Source: Siddiqui et al. 2024, arXiv:2407.15516.
"""

from __future__ import annotations

from collections.abc import Iterator

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.layer_skipping.skip import offer_halves, remove
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site

NAME = "skip_feed_forward"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per feed-forward block of every stream, alone or as a branch of a parallel layer."""
    yield from offer_halves(NAME, graph, facts, "feed_forward")


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob 1: without the block. Raises PlanError."""
    return remove(NAME, graph, site, knob)


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="layer_skipping", effect=Lossy(knob="skip", values=(0, 1)), saves=("flops", "bytes", "launches", "memory"),
    source="arXiv:2407.15516", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"cache"}),
)  # fmt: skip
