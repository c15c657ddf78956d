"""Skip a whole layer: all blocks of one period of the residual stream become the identity.

x -> x + attention(norm(x)) -> … + feed_forward(norm(…))   ->   x

Lossy. Saves all of the layer's operations and weights. The stream, its layout (pre-norm, post-norm, parallel, sandwich) and where a layer
begins come from dataflow. A layer of which a value is used elsewhere, like keys that go to a cache, stays.
Source: Men et al. 2024, arXiv:2403.03853.
"""

from __future__ import annotations

from collections.abc import Iterator

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.layer_skipping.skip import offer, remove
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site

NAME = "skip_block"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per layer of every stream."""
    for stream in facts.streams:
        blocks = {block.name: block for block in stream.blocks}
        if blocks and not stream.layers:
            kinds = ", ".join(block.kind for block in stream.blocks)
            yield Refusal(
                NAME, stream.values[-1], f"no layer begins or ends among the {len(blocks)} blocks ({kinds}): no run of them repeats"
            )
        yield from offer(NAME, graph, [tuple(blocks[name] for name in layer) for layer in stream.layers])


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob 1: without the layer. Raises PlanError."""
    return remove(NAME, graph, site, knob)


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="layer_skipping", effect=Lossy(knob="skip", values=(0, 1)), saves=("flops", "bytes", "launches", "memory"),
    source="arXiv:2403.03853", example=example, sites=sites, rewrite=rewrite, reads=frozenset({"cache"}),
)  # fmt: skip
