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

from torch import Tensor

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.ir.ops.quantized import coarse_share, quantized_int8
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.precision import linears
from paretorch.rewrites.precision.kept import Kept
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site

NAME = "int8"
COARSE = 0.02  # of all-MiniLM's linears no group in a thousand is coarse; of a probe on it, with one huge weight in each row, a sixth are

_rounded, _coarse_share = Kept(quantized_int8), Kept(coarse_share)


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream that holds a linear with weights of f32."""
    return linears.sites(NAME, graph, facts, RULE.knobs, lambda held: RULE.knobs[1:] * _is_even(held), "of sizes that go with one another")


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: "f32" or "int8". Raises PlanError if no linear is left there."""
    return linears.rounded(NAME, graph, site, _is_even, _rounded) if knob == "int8" else graph


def _is_even(held: Tensor) -> bool:
    """Whether no number of the weights dwarfs those that it shares a scale with."""
    return held.is_meta or _coarse_share(held) <= COARSE


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens, width=16))


RULE = Rule(
    name=NAME, family="precision", effect=Lossy(knob="dtype", values=("f32", "int8")), saves=("bytes", "memory"),
    source="arXiv:2208.07339", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
