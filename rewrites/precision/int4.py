"""Keep the weights of linears as four-bit integers, two in a byte, with a scale for each 32, 64 or 128 numbers of a row.

y = linear(x, W, bias)  ->  y = int4_linear(x, round(W / s), s, bias),  s = the largest of each group / -8, or a share of it

Lossy: weights are rounded to one of 16 steps, of which the largest number of a group is the last or, where that leaves less squared error, lies beyond
them. Runtimes that multiply integers round x to eight bits as well, which the held-out data sees, as it is run there. An eighth of the bytes of
weights, and their scales, which is what a product of few rows waits for; a runtime without such a product (torch) unpacks the weights in each call,
and saves memory alone. The site "model" is every linear, the others are those of each block of the residual stream; at each the knob has the lengths
of groups that divide the width of one of its linears. What stays: linears of other widths, or of fewer than LEAST weights; those with a share of groups
beyond COARSE in which one number dwarfs the others, which would be rounded away. A weight that something else reads as well, such as a table of
embeddings, stays beside its integers.
Source: Dettmers & Zettlemoyer 2023, arXiv:2212.09720 (blocks of weights, of four bits).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph
from paretorch.ir.ops.quantized import ZERO, coarse_share, quantized_int4
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.precision import linears
from paretorch.rewrites.precision.kept import Kept
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site

NAME = "int4"
GROUPS = (32, 64, 128)  # runtimes multiply each of them; longer ones are less to read, and less like the weights
COARSE = 0.02  # of the linears of all-MiniLM and of Gemma 3 270M one has more, at 128; of a probe on the former, with a huge weight a row, a sixth
STEPS = 2.0  # of the median number of a group, beyond which it is coarse

_rounded = {length: Kept(partial(quantized_int4, length=length)) for length in GROUPS}
_coarse_share = {length: Kept(partial(coarse_share, length=length, steps=ZERO, most=STEPS)) for length in GROUPS}


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """The whole model, and each block of a residual stream that holds a linear with weights of f32."""
    return linears.sites(
        NAME, graph, facts, RULE.knobs, _groups, "of a width that 32, 64 or 128 divides and of sizes that go with one another"
    )


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: "f32", or the length of a group. Raises PlanError if no linear that it divides is left there."""
    if knob not in GROUPS:
        return graph
    length = int(knob)
    return linears.rounded(NAME, graph, site, lambda held: length in _groups(held), _rounded[length])


def _groups(held: Tensor) -> tuple[int, ...]:
    """The lengths of groups that divide the rows of these weights, and in which no number dwarfs the others."""
    dividing = [length for length in GROUPS if held.shape[1] % length == 0]
    return tuple(length for length in dividing if held.is_meta or _coarse_share[length](held) <= COARSE)


def example(batch: int = 2, tokens: int = 9) -> Graph:
    return transformer(Sizes(batch, tokens, width=32))


RULE = Rule(
    name=NAME, family="precision", effect=Lossy(knob="group", values=("f32", *GROUPS)), saves=("bytes", "memory"),
    source="arXiv:2212.09720", example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
