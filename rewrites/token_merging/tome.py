"""Merge the r most alike pairs of tokens after an attention block, for all that follows.

x = block(x)  ->  x, size = merge_tokens(block(x), match_tokens(mean over heads of the keys, size, r), size)

and every later attention adds log(size) to the scores of its keys. Lossy; exact where the merged tokens are equal. At r tokens a layer,
layer l works on T - l * r tokens. Merging stands between attention and feed-forward, after the block where one sum holds both. Tokens that
are read by place stay; padding masks become size 0; r is cut to half of the tokens that may merge.
Source: Bolya et al. 2023, arXiv:2210.09461.
"""

from __future__ import annotations

from collections.abc import Iterator

from paretorch.ir.analyze import Facts, analyze
from paretorch.ir.errors import ParetorchError, PlanError
from paretorch.ir.graph import Graph, origin_of
from paretorch.ir.ops import is_op
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.rule import Knob, Lossy, Refusal, Rule, Site
from paretorch.rewrites.token_merging.carry import merge_at
from paretorch.rewrites.token_merging.place import find_place

NAME = "tome"
VALUES: tuple[int, ...] = (0, 4, 8, 12, 16, 24, 32, 48, 64)


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """One per self-attention, named by its node."""
    nodes = {node.name: node for node in graph.nodes}
    for axis in facts.axes.tokens:
        # What is downstream of a place is also downstream of those before it: one merge that works proves the later ones.
        proven = is_op(nodes[axis.atom.born], "match_tokens")
        for name in axis.mixers:
            place = find_place(graph, facts, axis, name)
            if isinstance(place, str):
                yield Refusal(NAME, name, place)
                continue
            values = tuple(value for value in VALUES if value <= place.largest)
            if len(values) < 2:
                few = f"{axis.atom.size} tokens, {place.protected} of them read by place, leave at most {place.largest} to merge"
                yield Refusal(NAME, name, f"{few}; the smallest step is {VALUES[1]}")
                continue
            site = Site(name, origin_of(place.mixer).path or name, values)
            fault = None if proven else _fault(graph, site, values[1])
            proven = proven or fault is None
            yield Refusal(NAME, name, fault) if fault else site


def _fault(graph: Graph, site: Site, knob: Knob) -> str | None:
    """What goes wrong when the merge is tried; None if nothing does."""
    try:
        rewrite(graph, site, knob)
    except ParetorchError as error:
        return str(error)
    return None


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    """knob: r, cut to what the tokens left here allow. Raises PlanError if the site is gone or merging is not legal there."""
    if not knob:
        return graph
    graph = graph.copy()
    facts = analyze(graph)
    axis = next((axis for axis in facts.axes.tokens if site.name in axis.mixers), None)
    if axis is None:
        raise PlanError(f"{NAME}: no self-attention is named {site.name} here; an earlier rewrite took it out or changed it")
    place = find_place(graph, facts, axis, site.name)
    if isinstance(place, str):
        raise PlanError(f"{NAME} at {site.name}: {place}")
    count = min(int(knob), place.largest)
    return merge_at(graph, facts.axes, place, count, NAME) if count > 0 else graph


def example(batch: int = 2, tokens: int = 13) -> Graph:
    return transformer(Sizes(batch, tokens))


RULE = Rule(
    name=NAME, family="token_merging", effect=Lossy(knob="r", values=VALUES), saves=("flops", "bytes", "memory"),
    source="arXiv:2210.09461", example=example, sites=sites, rewrite=rewrite,
    invalidates=frozenset({"positions", "token_count", "grid"}),
)  # fmt: skip
