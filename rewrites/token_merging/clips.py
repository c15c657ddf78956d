"""Clips: what tells that the rows of a batch are frames of fewer samples, and what behind a place still needs every frame by itself.

Read off the views around the encoder: [B,F,C,H,W] -> [B*F,C,H,W] in front of it, or [B*F,D] -> [B,F,D] behind it. What both have in common is a
batch that is a product whose inner factor is the frames. That alone could be samples of their own, such as the choices of a question; so
something behind the place must also join the frames of one sample: a sum, mean or maximum over them, or attention from frame to frame. The frames of a
sample are neighbours in the batch, and g of them are folded into one row, with g the smallest prime factor of their number (12 = 2 * 2 * 3).

On clips works what treats each row of the batch by itself, while there are tokens. The mean over tokens and then over frames is that over the
rows of all clips, weighted by their sizes, if nothing but affine maps stand between the two means, since all clips have as many frames. Whatever else
reads frames gets each of them back just before it: its leading tokens, which are never merged, from their rows, and any other token by the
composed map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, Facts, TokenAxis, Use, axis_of
from paretorch.ir.analyze.atoms import quotient
from paretorch.ir.graph import Graph, origin_of, shape_of, tensor_type
from paretorch.ir.ops import TOKEN_OPS, is_op, op_of
from paretorch.ir.types import Size

AFFINE = ("add", "sub", "neg", "mean", "view", "permute", "unsqueeze", "squeeze", "expand", "to", "clone", "slice", "select", "getitem")
WORKS = ("weigh_tokens",)  # of our ops on tokens those that work on clips: the merge tells them the sizes


@dataclass(frozen=True)
class Clips:
    """axis: the part of the batch that gets shorter, with the frames inside; frames: how many a sample has; fold: how many become one clip."""

    axis: TokenAxis
    frames: int
    fold: int

    @property
    def fewer(self) -> Size:
        """The size of the axis in clips."""
        found = quotient(self.axis.atom.size, self.fold)
        assert found is not None  # the frames are a factor of it
        return found


def clips_of(graph: Graph, facts: Facts, name: str, batch: tuple[Atom, ...], downstream: Sequence[Node]) -> Clips | str:
    """The frames in a batch, or a sentence that says why its rows are none. name: whose batch it is, for sentences."""
    if not batch:
        return f"{name} has a batch of one row, so there are no frames to join"
    inner = batch[-1]
    if len(batch) > 1 or (facts.axes.dim(inner.born, inner) or 0) > 0:  # behind another dimension, be it of one sample
        frames = inner
    else:
        split = _split_behind(graph, facts.axes, inner, downstream)
        if split is None:
            return f"nothing in the graph tells that the {inner.size} rows of the batch of {name} are frames of fewer samples"
        frames = split
    if not isinstance(frames.size, int):
        return f"{name} reads {frames.size} frames of each sample, a number not known before it runs"
    if not _joined(facts, axis_of(graph, frames), [atom for atom in batch if atom not in (frames, inner)], downstream, graph):
        alone = "so they are samples of their own, which may not see each other"
        return f"nothing behind {name} sums up or attends over the {frames.size} rows that each sample has in its batch, {alone}"
    return Clips(axis_of(graph, inner), frames.size, _smallest_factor(frames.size))


def _smallest_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)


def _split_behind(graph: Graph, axes: AxisFacts, inner: Atom, downstream: Iterable[Node]) -> Atom | None:
    """The inner factor of a batch that a view behind splits in two."""
    for node in downstream:
        x: Any = node.args[0] if node.args else None
        if not is_op(node, "view") or not isinstance(x, Node) or node.name not in axes.maps:
            continue
        begins = [place for place, atoms in enumerate(axes.maps.get(x.name, ())) if atoms[:1] == (inner,)]
        outer, parts = [*axes.maps[node.name][begins[0] : begins[0] + 2], (), ()][:2] if begins else ((), ())
        if len(outer) == 1 and parts and outer[0].size * parts[0].size == inner.size:
            return parts[0]  # behind it stand those that were folded already
    return None


def _joined(facts: Facts, frames: TokenAxis, samples: Sequence[Atom], downstream: Iterable[Node], graph: Graph) -> bool:
    """Whether something behind reduces the frames of each sample, or lets them attend to each other."""
    inside = {node.name: node for node in downstream}
    if any(frames.atom.number in axis.family and inside.keys() & set(axis.mixers) for axis in facts.axes.tokens):
        return True  # of the family, as they may be what is left of the frames after an earlier fold
    for use in frames.uses:
        node = inside.get(use.node)
        if node is not None and use.kind == "pools" and (op := op_of(node)) is not None and op.axes == "reduce":
            made = {atom for atoms in facts.axes.maps.get(node.name, ()) for atom in atoms}
            if set(samples) <= made:
                return True
    return False


def needs_frames(graph: Graph, facts: Facts, axis: TokenAxis, clips: Clips) -> Callable[[Node], str | None]:
    """Why a node must see every frame by itself, None if it need not. axis: of the tokens."""
    uses: dict[str, list[Use]] = {}
    for use in clips.axis.uses:
        uses.setdefault(use.node, []).append(use)
    places = {use.node for use in axis.uses if use.kind == "selects"}
    pools = {use.node for use in axis.uses if use.kind == "pools"}

    def is_pooled(value: Node) -> bool:
        """Whether a value has the frames and no longer their tokens."""
        found = {atom.number for atoms in facts.axes.maps.get(value.name, ()) for atom in atoms}
        return bool(found & clips.axis.family) and not found & axis.family

    def whole(node: Node) -> str | None:
        if is_op(node, *TOKEN_OPS) and not is_op(node, *WORKS):
            return f"{node.meta.get('rule') or node.name} at {node.meta.get('site') or node.name} counts the tokens of each frame by itself"
        if is_op(node, "sym_size"):
            return f"{node.name} ({origin_of(node)}) reads a size of the frames"
        if node.name in places:
            return f"{node.name} ({origin_of(node)}) reads tokens of each frame by their places"
        if is_op(node, "softmax") or (node.name in pools and not is_op(node, "mean")):
            return f"{node.name} ({origin_of(node)}) is {node.target} over the tokens of each frame; only their mean is that of a clip"
        if not _is_affine(node, is_pooled):
            return (
                f"{node.name} ({origin_of(node)}) is {node.target} of what is pooled from each frame; only affine maps are those of a clip"
            )
        return next((reason for use in uses.get(node.name, ()) if (reason := _refused(node, use, clips))), None)

    return whole


def _is_affine(node: Node, is_pooled: Callable[[Node], bool]) -> bool:
    """Whether a node is an affine map of what is pooled from frames, if it reads that: then it is the same on means of several."""
    given = [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, Node) and is_pooled(argument)]
    if not given or is_op(node, *AFFINE):
        return True
    first = isinstance(node.args[0], Node) and is_pooled(node.args[0])
    return len(given) == 1 and (is_op(node, "mul") or (first and is_op(node, "div", "linear", "matmul")))


def _refused(node: Node, use: Use, clips: Clips) -> str | None:
    op, name = op_of(node), f"{node.name} ({origin_of(node)})"
    batched = op is not None and op.axes in ("attention", "matmul")  # its batch must stay aligned, which it does
    if use.kind in ("pointwise", "returns") or (use.kind == "positions" and batched):
        return None
    if use.kind == "bakes_length":
        return use.reason or None
    if use.kind == "pools" and is_op(node, "mean"):
        return use.reason or None
    return (
        use.reason or f"{name} is {node.target}, which needs every one of the {clips.frames} frames: {tensor_type(node.all_input_nodes[0])}"
    )


def meets_frames(axes: AxisFacts, clips: Clips, node: Node, other: Node, short: Iterable[Node]) -> bool:
    """Whether an operand of a product has a batch of every frame where another has one of clips."""
    op = op_of(node)
    if op is None or op.axes not in ("attention", "matmul"):
        return False
    sizes = shape_of(other)[:-2]
    for value in short:
        batch = axes.maps.get(value.name, ())[:-2]
        for size, atoms in zip(reversed(sizes), reversed(batch), strict=False):
            if size != 1 and any(atom.number in clips.axis.family for atom in atoms):
                return True
    return False
