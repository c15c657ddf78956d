"""A shorter prompt: tokens that a step left go into a longer sequence as they are, instead of being brought back in front of it.

cat([.., unmerge_tokens(x, map), ..])  ->  cat([.., x, ..]), and what is behind it works on the rows of the tokens that stayed

Of the tokens that are one row only the first would say something new to a language model. So the row stands at the place of the token that it
kept, tables of positions and masks are looked up there, order is kept, and causal attention stays causal: all words see all tokens of the
picture that stand before them. No sizes are told, as in the published methods that shorten prompts. Legal where nothing behind the join needs all
of its entries: no output with an entry for each, no average, no window; selections of the words alone, in front or behind, are. Where it is
not legal, or the sequence is read both ways as in an encoder (which has to know the sizes), the tokens stay brought back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import AxisFacts, Use, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.rewrites.token_merging.gathered import Cut, drop_at, find_cut
from paretorch.rewrites.token_merging.place import batch_of, computed_from, named


@dataclass(frozen=True)
class Join:
    """joined: the concatenation; part: its operand that was brought back; before, after: how many entries stand around the tokens."""

    joined: Node
    part: Node
    before: int
    after: int
    dim: int


def shorten_prompts(graph: Graph, rule: str, site: str) -> Graph:
    """The graph with every sequence shorter that tokens brought back by this rule enter, as far as that is legal."""
    seams = [node.name for node in graph.calls if is_op(node, "unmerge_tokens")]
    joins = [(seam, user.name) for seam in seams for user in graph.node(seam).users if is_op(user, "cat")]  # type: ignore[union-attr]
    for seam, joined in joins:
        shorter = graph.copy()
        try:
            graph = _shortened(shorter, seam, joined, rule, site)
        except PlanError:
            continue  # they stay brought back, which is legal
    return graph


def _shortened(graph: Graph, seam: str, joined: str, rule: str, site: str) -> Graph:
    """The graph, edited in place, with one sequence shorter. Raises PlanError with what forbids it."""
    join = _join(graph, seam, joined)
    kept = _kept(graph, join.part, rule, site)
    _count_from_end(graph, analyze(graph).axes, join)
    facts = analyze(graph)
    atoms = facts.axes.maps[join.joined.name][join.dim]
    axis = next((axis for axis in facts.axes.tokens if (axis.atom,) == atoms and axis.mixers), None)
    if axis is None:
        raise PlanError(f"no attention runs over the entries that {named(join.joined)} joins")
    if not axis.causal:
        raise PlanError(f"what {named(join.joined)} joins is no prompt: its entries see each other both ways, and would miss the sizes")
    mixer = graph.node(axis.mixers[0])
    assert mixer is not None  # the analysis has its name from the graph
    cut = find_cut(graph, facts.axes, axis, join.joined, batch_of(facts.axes, mixer), [], _sight, join.after)
    if isinstance(cut, str):
        raise PlanError(cut)
    if cut.protected > join.before:
        raise PlanError(f"{cut.protected} leading entries of {named(join.joined)} are read by place, {join.before} stand before the tokens")
    return _dropped(graph, facts.axes, join, cut, kept, mixer, rule)


def _dropped(graph: Graph, axes: AxisFacts, join: Join, cut: Cut, kept: Node, mixer: Node, rule: str) -> Graph:
    chosen: list[Node] = []

    def choose(b: Builder) -> Node:
        chosen.append(b.places_among(kept, join.before, join.after, shape_of(join.part)[join.dim]))
        return chosen[0]

    drop_at(graph, axes, cut, mixer, rule, [], choose)
    rows: Node = join.part.args[0]  # type: ignore[assignment]
    for taken in [user for user in join.joined.users if is_op(user, "keep_tokens") and user.args[1] is chosen[0]]:
        b = Builder(graph, taken, origin=taken.meta.get("origin"), rule=rule, site=taken.meta.get("site", ""))
        parts = [rows if part is join.part else part for part in arguments(join.joined)["tensors"]]
        shorter = b.call(aten("cat.default"), (parts, join.dim))
        for item in list(taken.users):
            graph.replace(item, shorter)  # nobody asks for sizes there
    return graph.clean()


def _join(graph: Graph, seam: str, joined: str) -> Join:
    part, whole = graph.node(seam), graph.node(joined)
    if part is None or whole is None:
        raise PlanError(f"{joined} is shorter already by other tokens that are brought back in front of it")
    given = arguments(whole)
    tensors, dim = list(given["tensors"]), given.get("dim", 0) % len(shape_of(whole))
    lengths = [shape_of(tensor)[dim] for tensor in tensors]
    if dim != 1 or len(shape_of(whole)) != 3 or tensors.count(part) != 1 or not all(isinstance(length, int) for length in lengths):
        raise PlanError(f"{named(whole)} does not put the tokens once into a sequence of known length")
    place = tensors.index(part)
    return Join(whole, part, int(sum(lengths[:place])), int(sum(lengths[place + 1 :])), dim)


def _kept(graph: Graph, part: Node, rule: str, site: str) -> Node:
    """i64[B,K]: the places of the tokens that stayed, among all that were brought back."""
    chain: list[tuple[Node, Node]] = []
    places: Any = part.args[1]
    while is_op(places, "source_map"):
        given = arguments(places)
        chain.append((places, given["kept"]))
        places = given["previous"]
    if not chain or places is not None or rule not in [node.meta.get("rule") for node, _ in chain]:
        raise PlanError(f"{named(part)} brings tokens back that {rule} did not take")
    _, kept = chain.pop()
    for node, later in reversed(chain):
        b = Builder(graph, node, origin=node.meta.get("origin"), rule=rule, site=site)
        kept = b.call(aten("gather.default"), (kept, 1, later))
    return kept


def _count_from_end(graph: Graph, axes: AxisFacts, join: Join) -> None:
    """Let selections of what stands behind the tokens count places from the end, which stay theirs."""
    atoms, length = axes.maps[join.joined.name][join.dim], join.before + shape_of(join.part)[join.dim] + join.after
    for node in computed_from(graph, join.joined):
        if not is_op(node, "select", "slice"):
            continue
        given, maps = arguments(node), axes.maps.get(arguments(node)["self"].name, ())
        name = "index" if is_op(node, "select") else "start"
        first, dim = given.get(name), given.get("dim", 0) % max(len(maps), 1)
        ends = is_op(node, "select") or given.get("end") is None or given["end"] >= length
        if maps and maps[dim] == atoms and ends and isinstance(first, int) and length - join.after <= first < length:
            place = [argument.name for argument in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
            node.args = (*node.args[:place], first - length, *node.args[place + 1 :])


def _sight(node: Node, use: Use) -> str | None:
    """Dropped tokens are missed by nothing but averages and what is no attention."""
    if is_op(node, "attention") and use.kind == "mixes":
        return None
    return f"{named(node)} is {node.target} over all entries, and counts those that are dropped"
