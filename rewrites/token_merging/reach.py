"""How far a merge reaches: what downstream of it works on merged tokens, and where the tokens are brought back.

A node that reads merged tokens works on them unless it must see all tokens in their places (the model's output, a grid, a convolution, a
token selected from the middle, positions) or meets a value that still has all of them. There the merged operand is brought back, and what
follows has its old length again. Where a value cannot be brought back as it stands (its tokens are split into a grid already) the node that
made it is held to all tokens instead, and so on backwards. Where the value before a residual block would be brought back only to be added to
the block's branch, it is brought back for the whole block, so that the stream stays one. An attention that must see all tokens, where its values
are merged ones, makes no end of the merged stream: its results are brought down to merged rows (see `virtual`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, TokenAxis
from paretorch.ir.graph import arguments, origin_of, shape_of, tensor_type
from paretorch.ir.ops import op_of
from paretorch.ir.types import TensorType, from_fake
from paretorch.rewrites.token_merging.clips import Clips, meets_frames
from paretorch.rewrites.token_merging.rows import layout_of, may_weigh, weight_chain
from paretorch.rewrites.token_merging.virtual import end_of_moves, enters_step, feeding, is_brought_down, may_be_virtual, pulled

PRODUCTS = ("matrix", "convolution", "attention")
ATTENDED = "an attention that reads places runs on all tokens"
TOLD = ("mask", "key_bias", "size")  # operands of ops on tokens that the merge's sizes take the place of


@dataclass(frozen=True)
class Cut:
    """value, of merged tokens, is brought back for user; reason: the sentence that says why user needs all tokens."""

    value: Node
    user: Node
    reason: str


@dataclass(frozen=True)
class Reach:
    """merged: the nodes that read merged tokens, in order; cuts: where tokens are brought back (the value itself never is: it is still there);
    lowered: values of all tokens that are brought down for those that read merged ones; virtual: the attentions that run on all tokens."""

    merged: tuple[Node, ...]
    cuts: tuple[Cut, ...]
    lowered: tuple[Node, ...] = ()
    virtual: frozenset[Node] = frozenset()

    @property
    def whole(self) -> frozenset[Node]:
        """What reads all tokens behind what was merged, while what follows it does not."""
        return self.virtual | set(self.lowered)

    @property
    def works(self) -> bool:
        """Whether some product runs on fewer tokens."""
        return any(op.kind in PRODUCTS for node in self.merged if (op := op_of(node)) is not None)


@dataclass(frozen=True)
class Start:
    """value: what is merged; batch: its batch's atoms; whole: why a node must see all tokens, or None; inside: of the residual block that
    begins with a value, the nodes up to the block's end (none if no block does); clips: the part of the batch that gets shorter with them, if any does;
    may_be_virtual: whether results of attention may be brought down."""

    axes: AxisFacts
    axis: TokenAxis
    value: Node
    batch: tuple[Atom, ...]
    whole: Callable[[Node], str | None]
    inside: Callable[[Node], set[Node]]
    clips: Clips | None = None
    may_be_virtual: bool = False

    @property
    def family(self) -> frozenset[int]:
        """The numbers of all atoms that get shorter."""
        return self.axis.family | (self.clips.axis.family if self.clips else frozenset())


def reach_of(start: Start, downstream: Sequence[Node]) -> Reach:
    """What a merge of the value reaches. downstream: all that is computed from it, in order."""
    held: dict[Node, str] = {}
    found = _settled(start, downstream, held, frozenset())
    more = pulled(found.whole, downstream, set(found.merged))
    if more:
        held.update(dict.fromkeys(more, ATTENDED))
        found = _settled(start, downstream, held, found.virtual)
    return replace(found, cuts=tuple(cut for cut in found.cuts if cut.value is not start.value))


def _settled(start: Start, downstream: Sequence[Node], held: dict[Node, str], virtual: frozenset[Node]) -> Reach:
    """Passes until no more nodes must be held to all tokens; those are added to `held`. virtual: attentions that are known to run on all tokens."""
    while True:
        found = _Spread(start, downstream, held, virtual).reach()
        more = _held_back(start, found, downstream)
        if not more.keys() - held.keys():
            return found
        held.update(more)


class _Spread:
    """One pass, with some nodes held to all tokens. short: values of which there are merged rows, their places or something of their length."""

    def __init__(self, start: Start, downstream: Sequence[Node], held: dict[Node, str], virtual: frozenset[Node]) -> None:
        self.start, self.downstream, self.held, self.virtual = start, downstream, held, set(virtual)
        self.short = {start.value}
        self.merged: list[Node] = []
        self.cuts: list[Cut] = []
        self.lowered: dict[Node, None] = {}
        self.ends: set[Node] = set()  # where results of attentions on all tokens are brought down

    def reach(self) -> Reach:
        for node in self.downstream:
            self._visit(node)
        return Reach(tuple(self.merged), tuple(self.cuts), tuple(self.lowered), frozenset(self.virtual))

    def _visit(self, node: Node) -> None:
        start = self.start
        given = [argument for argument in node.all_input_nodes if argument in self.short]
        reason = self._reason(node, given) if given else None
        if node in self.virtual or (reason and start.may_be_virtual and may_be_virtual(start.axes, start.axis.atom, start.batch, node)):
            self.virtual.add(node)
            self.ends.add(end_of_moves(start.axes, start.axis.atom, start.batch, node))
        if node in self.ends or (not given and self._comes_down(node)):
            self._bring_down(node)
        elif given and not reason and node not in self.virtual:
            self.merged.append(node)
            if carries(start.axes, start.family, node):
                self.short.add(node)
        if node.op == "output":
            self.cuts += [
                Cut(value, node, _returned(start, value)) for value in given if value not in self.lowered and value is not start.value
            ]
        elif reason or node in self.virtual:
            self.cuts += [Cut(value, node, reason or ATTENDED) for value in given if value not in self.lowered]

    def _reason(self, node: Node, given: list[Node]) -> str | None:
        if node.op == "output":
            return "returned"
        return self.held.get(node) or self.start.whole(node) or _meeting(self.start, node, self.short)

    def _comes_down(self, node: Node) -> bool:
        """Whether merged rows of a value of all tokens are wanted: of what an earlier step brought down, or a later one reads."""
        start = self.start
        if not start.may_be_virtual or layout_of(start.axes, node, start.axis.atom, start.batch) is None:
            return False
        return is_brought_down(start.axes, start.axis.atom, node) or enters_step(start.axes, start.axis.atom, node, self.short)

    def _bring_down(self, node: Node) -> None:
        self.lowered[node] = None
        self.short.add(node)


def carries(axes: AxisFacts, family: frozenset[int], node: Node) -> bool:
    """Whether a value, or one of several that a node makes, has an axis of a family."""
    if node.name in axes.maps:
        return any(atom.number in family for atoms in axes.maps[node.name] for atom in atoms)
    several = isinstance(node.meta.get("val"), (tuple, list))
    return several and any(carries(axes, family, user) for user in node.users)


def _returned(start: Start, value: Node) -> str:
    return f"the model returns {value.name} ({origin_of(value)}), {tensor_type(value)}, with one entry for each of the {start.axis.atom.size} tokens"


def _meeting(start: Start, node: Node, short: set[Node]) -> str | None:
    """A sentence if some operand still has all tokens."""
    ours = getattr(node.target, "namespace", "") == "paretorch"
    told = {value for name, value in arguments(node).items() if name in TOLD and isinstance(value, Node)} if ours else set()
    others = [argument for argument in node.all_input_nodes if argument not in short and argument not in told]
    full = [other for other in others if carries(start.axes, start.family, other) or _aligned(start, node, other, short)]
    full = [other for other in full if not _is_weight(start, node, other)]
    if not full:
        return None
    return f"{node.name} ({origin_of(node)}) reads {full[0].name}, {tensor_type(full[0])}, which has all {start.axis.atom.size} tokens"


def _aligned(start: Start, node: Node, other: Node, short: set[Node]) -> bool:
    """Whether an operand of an elementwise op, or of a lookup entry by entry, has a length where another has the axis."""
    op = op_of(node)
    if start.clips is not None and meets_frames(start.axes, start.clips, node, other, short.intersection(node.all_input_nodes)):
        return True
    if op is None or op.axes not in ("pointwise", "gather") or not isinstance(from_fake(other.meta["val"]), TensorType):
        return False
    sizes = shape_of(other)
    for value in node.all_input_nodes:
        if value not in short:
            continue
        for place, atoms in enumerate(reversed(start.axes.maps.get(value.name, ())), 1):
            if place <= len(sizes) and sizes[-place] != 1 and any(atom.number in start.family for atom in atoms):
                return True
    return False


def _is_weight(start: Start, node: Node, other: Node) -> bool:
    """Whether an operand is a weight per token: it is merged along, but not folded."""
    return start.clips is None and other in may_weigh(node) and weight_chain(start.axes, start.axis.atom, start.batch, other) is not None


def _held_back(start: Start, reach: Reach, downstream: Sequence[Node]) -> dict[Node, str]:
    """Nodes that must work on all tokens, for what reads them to get all tokens."""
    held: dict[Node, str] = {}
    fed = feeding(reach.whole, downstream, set(reach.merged)) | reach.whole
    for cut in reach.cuts:
        if cut.value is not start.value and layout_of(start.axes, cut.value, start.axis.atom, start.batch) is None:
            held.setdefault(cut.value, cut.reason)
        elif cut.user.op != "output" and cut.user not in fed:
            for node in _branch(start, reach.merged, cut):
                held.setdefault(node, cut.reason)
    return held


def _branch(start: Start, merged: Iterable[Node], cut: Cut) -> list[Node]:
    """What reads the value before a residual block inside of the block, if the block's end reads it with all tokens."""
    inside = start.inside(cut.value)
    if cut.user not in inside:
        return []
    near = set(merged)
    return [user for user in cut.value.users if user in inside and user in near and user is not cut.user]
