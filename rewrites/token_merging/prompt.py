"""A shorter prompt: tokens that a step left go into a longer sequence as they are, instead of being brought back in front of it.

cat([.., f(unmerge_tokens(x, map)), ..])  ->  cat([.., f(x), ..]), and what is behind it works on the rows of the tokens that stayed

f is what is done to each token alone, such as a projection, and may cut off leading tokens, such as a class token.
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
from paretorch.ir.ops import aten, is_op, op_of
from paretorch.ir.ops.tokens import match_of
from paretorch.rewrites.token_merging.gathered import END, Cut, drop_at, find_cut
from paretorch.rewrites.token_merging.place import batch_of, computed_from, named


@dataclass(frozen=True)
class Join:
    """seam: what was brought back; chain: what is done to each token of it before it enters `joined`, the concatenation; skipped: leading
    tokens that are cut off on the way; before, after: how many entries stand around the tokens."""

    seam: Node
    chain: tuple[Node, ...]
    skipped: int
    joined: Node
    before: int
    after: int
    dim: int

    @property
    def part(self) -> Node:
        """The operand of the concatenation."""
        return self.chain[-1] if self.chain else self.seam


def shorten_prompts(graph: Graph, rule: str, site: str) -> Graph:
    """The graph with every sequence shorter that tokens brought back by this rule enter, as far as that is legal."""
    axes = analyze(graph).axes
    seams = [node for node in graph.calls if is_op(node, "unmerge_tokens")]
    joins = [(chain[0].name, chain[-1].name) for seam in seams for chain in _chains(axes, seam)]
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
    kept = _kept(graph, join, rule, site)
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
    for taken in [user for user in join.joined.users if is_op(user, "keep_tokens") and user.args[1] is chosen[0]]:
        b = Builder(graph, taken, origin=taken.meta.get("origin"), rule=rule, site=taken.meta.get("site", ""))
        rows = _fewer(b, join)
        parts = [rows if part is join.part else part for part in arguments(join.joined)["tensors"]]
        shorter = b.call(aten("cat.default"), (parts, join.dim))
        for item in list(taken.users):
            graph.replace(item, shorter)  # nobody asks for sizes there
    return graph.clean()


def _chains(axes: AxisFacts, seam: Node) -> list[tuple[Node, ...]]:
    """From what was brought back to each concatenation that it enters, by what is done to each token alone."""
    found: list[tuple[Node, ...]] = []
    todo: list[tuple[Node, ...]] = [(seam,)]
    while todo:
        chain = todo.pop()
        for user in chain[-1].users:
            if is_op(user, "cat"):
                found.append((*chain, user))
            elif _each(axes, chain[-1], user):
                todo.append((*chain, user))
    return found


def _each(axes: AxisFacts, x: Node, user: Node) -> bool:
    """Whether a node does something to each token of x [B,T,..] alone, or cuts off leading ones."""
    op, given = op_of(user), arguments(user) if user.op == "call_function" else {}
    maps, before = axes.maps.get(user.name, ()), axes.maps.get(x.name, ())
    if op is None or len(maps) != 3 or len(before) != 3:
        return False
    if is_op(user, "slice"):
        return (
            given.get("dim", 0) % 3 == 1 and (given.get("start") or 0) > 0 and given.get("end") in (None, END) and given.get("step", 1) == 1
        )
    others = [shape_of(other) for other in user.all_input_nodes if other is not x]
    plain = op.axes in ("last_axis", "linear") or (op.axes == "pointwise" and all(len(shape) < 2 or shape[-2] == 1 for shape in others))
    return plain and user.args[0] is x and maps[1] == before[1]


def _join(graph: Graph, seam: str, joined: str) -> Join:
    start, whole = graph.node(seam), graph.node(joined)
    chains = [chain for chain in _chains(analyze(graph).axes, start) if chain[-1] is whole] if start is not None else []
    if start is None or whole is None or len(chains) != 1:
        raise PlanError(f"{joined} does not take the tokens of {seam} once, or not any more")
    (_, *chain, _), given = chains[0], arguments(whole)
    part = chain[-1] if chain else start
    tensors, dim = list(given["tensors"]), given.get("dim", 0) % len(shape_of(whole))
    lengths = [shape_of(tensor)[dim] for tensor in tensors]
    if dim != 1 or len(shape_of(whole)) != 3 or tensors.count(part) != 1 or not all(isinstance(length, int) for length in lengths):
        raise PlanError(f"{named(whole)} does not put the tokens once into a sequence of known length")
    place, skipped = tensors.index(part), sum(int(arguments(node)["start"]) for node in chain if is_op(node, "slice"))
    return Join(start, tuple(chain), skipped, whole, int(sum(lengths[:place])), int(sum(lengths[place + 1 :])), dim)


def _fewer(b: Builder, join: Join) -> Node:
    """What is done to each token, done to the rows that are left of them."""
    current: Node = join.seam.args[0]  # type: ignore[assignment]
    for node, source in zip(join.chain, (join.seam, *join.chain), strict=False):
        current = b.call(node.target, [current if argument is source else argument for argument in node.args], dict(node.kwargs))
    return current


def _kept(graph: Graph, join: Join, rule: str, site: str) -> Node:
    """i64[B,K]: the places of the tokens that stayed, among all that enter the sequence."""
    chain: list[tuple[Node, Node]] = []
    places: Any = join.seam.args[1]
    while is_op(places, "source_map"):
        given = arguments(places)
        chain.append((places, given["kept"]))
        places = given["previous"]
    if not chain or places is not None or rule not in [node.meta.get("rule") for node, _ in chain]:
        raise PlanError(f"{named(join.seam)} brings tokens back that {rule} did not take")
    protected = [arguments(match_of(kept))["protected"] if match_of(kept) else 0 for _, kept in chain]  # type: ignore[arg-type]
    if min(protected) < join.skipped:
        raise PlanError(f"{join.skipped} leading tokens are cut off behind {named(join.seam)}, of which {min(protected)} stay for sure")
    last, kept = chain.pop()
    for node, later in reversed(chain):
        last, b = node, Builder(graph, node, origin=node.meta.get("origin"), rule=rule, site=site)
        kept = b.call(aten("gather.default"), (kept, 1, later))
    if join.skipped:
        b = Builder(graph, last, origin=last.meta.get("origin"), rule=rule, site=site)
        kept = b.add(b.slice(kept, 1, join.skipped, END), -join.skipped)
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
