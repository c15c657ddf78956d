"""Virtual unmerging: an attention that reads places runs on all tokens, of which those that were merged are copies, between merged rows.

    attention(turn(q), turn(k), v)  ->  merge(attention(turn(unmerge(q)), turn(unmerge(k)), unmerge(v)))

turn: whatever reads the places of the tokens, such as a rotation by a table of positions; a window, or a bias of pairs of places, does so in the
attention itself. Rows are brought back as they come from their projection, so that one lookup serves a packed one, and every copy has the place of
its token. Each copy counts once: no sizes are told, and masks stay as they were. The results of a group's copies become their average, by the weights
by which the tokens themselves were merged, as soon as they are rows again. Projections, norms and feed-forward run on merged rows. Equal tokens at
different places have different results there, so merging them is the same function as averaging those, and exact for what looks at no other row.
Source: Wang et al. 2025, arXiv:2504.17040.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts
from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.tokens import is_match, is_reduction, lowered_by
from paretorch.rewrites.token_merging.rows import layout_of, restored, rows_of

MOVES = ("view", "permute", "transpose", "clone")  # what only lays rows out
CHEAP = ("view", "copy", "elementwise")  # kinds of ops that cost no more on all tokens than a lookup does


def may_be_virtual(axes: AxisFacts, atom: Atom, batch: Sequence[Atom], node: Node) -> bool:
    """Whether a node is an attention of an axis to itself whose results can be told apart by token."""
    if not is_op(node, "attention", "local_attention"):
        return False
    given = arguments(node)
    over = [axes.maps.get(given[name].name, ((), ()))[-2] for name in ("query", "key")]
    return over == [(atom,), (atom,)] and layout_of(axes, node, atom, batch) is not None


def end_of_moves(axes: AxisFacts, atom: Atom, batch: Sequence[Atom], node: Node) -> Node:
    """The last of the values that only lay out what a node makes, as long as nothing else reads them and tokens are one dimension there."""
    while len(node.users) == 1 and is_op(user := next(iter(node.users)), *MOVES) and layout_of(axes, user, atom, batch) is not None:
        node = user
    return node


def is_brought_down(axes: AxisFacts, atom: Atom, node: Node) -> bool:
    """Whether a node is what an earlier step left, on this axis, of values of more tokens."""
    if node.target is not operator.getitem or node.args[1] != 0 or not is_reduction(node.args[0]):  # type: ignore[arg-type]
        return False
    return axes.maps.get(node.name, ((), ()))[1] == (atom,)


def enters_step(axes: AxisFacts, atom: Atom, node: Node, short: Collection[Node]) -> bool:
    """Whether a later step, which makes merged rows fewer, reads this value of all tokens of the axis: its match looks at it, or it is reduced too."""
    if axes.maps.get(node.name, ((), ()))[1:2] != ((atom,),):
        return False
    if any(is_reduction(user) and user.args[0] is node and user.args[1] in short for user in node.users):
        return True
    matches = [user for user in node.users if is_match(user) and user.args[0] is node]
    reductions = (user for match in matches for item in match.users for user in item.users if is_reduction(user) and user.args[1] is item)
    return any(_laid_out(reduction.args[0]) in short for reduction in reductions)  # type: ignore[arg-type]


def _laid_out(x: Node) -> Node:
    while is_op(x, *MOVES):
        x = x.args[0]  # type: ignore[assignment]
    return x


def feeding(ends: Collection[Node], nodes: Sequence[Node], merged: Collection[Node]) -> set[Node]:
    """The nodes that work on all tokens for nothing but these ends, attentions and what is brought down."""
    return _before(ends, (node for node in reversed(nodes) if node not in merged))


def pulled(ends: Collection[Node], nodes: Sequence[Node], merged: Collection[Node]) -> set[Node]:
    """Of the merged nodes those that had better work on all tokens: cheap ones between projections and these ends, if then fewer values are
    brought back, or as many."""
    fed = feeding(ends, nodes, merged) | set(ends)
    found = _before(fed, (node for node in reversed(nodes) if node in merged and _is_cheap(node)))
    before, after = (_entering(region, merged) for region in (fed, fed | found))
    return found if len(after) <= len(before) else set()


def _before(ends: Collection[Node], candidates: Iterable[Node]) -> set[Node]:
    """Those of the candidates, last first, that only such candidates and the ends read."""
    found: set[Node] = set()
    for node in candidates:
        if node not in ends and node.users and all(user in ends or user in found for user in node.users):
            found.add(node)
    return found


def _entering(region: Collection[Node], merged: Collection[Node]) -> set[Node]:
    return {argument for node in region for argument in node.all_input_nodes if argument in merged and argument not in region}


def _is_cheap(node: Node) -> bool:
    op = op_of(node)
    return node.target is operator.getitem or (op is not None and op.kind in CHEAP)


def bring_down(
    graph: Graph, axes: AxisFacts, atom: Atom, batch: Sequence[Atom], lowered: Sequence[Node], readers: Sequence[Node],
    merge: Callable[[Builder, Node], Node], b: Builder,
) -> list[Node]:  # fmt: skip
    """Let the readers have merged rows of the values that are to be brought down; what they read now. merge: rows [B,T,D] -> [B,T',D]."""
    near, made = set(readers), []
    for node in lowered:
        layout = layout_of(axes, node, atom, batch)
        assert layout is not None  # only such values are brought down
        at = Builder(graph, node.next, origin=origin_of(node), rule=b.rule, site=b.site)
        users = [user for user in node.users if user in near]
        fewer = restored(at, merge(at, rows_of(at, node, layout)), node, layout)
        for user in users:
            user.replace_input_with(node, fewer)
        made.append(fewer)
    return made


def size_behind(b: Builder, mixer: Node) -> Node | None:
    """The sizes of the rows to which an attention's results are brought down, T[B,T']; None if all are one."""
    last = lowered_by(mixer)[-1]
    return None if is_op(last, "keep_tokens") and arguments(last)["size"] is None else b.item(last, 1)


def brought_down_as(b: Builder, mixer: Node, rows: Node) -> Node:
    """Rows of all tokens that an attention sees, T[B,T,D], brought down as its results are: T[B,T',D]."""
    for reduction in lowered_by(mixer):
        rows = b.item(b.call(reduction.target, (rows, *reduction.args[1:])), 0)
    return rows
