"""What the analyses find, as plain values. Nodes are named, not held, so that facts stay true of any copy of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from paretorch.ir.types import Size


@dataclass(frozen=True)
class Atom:
    """One logical axis, followed through the graph. A dimension is a product of atoms; equal lengths never make two atoms one.

    number: unique; size: its length; born: the node that made it.
    """

    number: int
    size: Size
    born: str


AxisMap = tuple[tuple[Atom, ...], ...]  # for each dimension the atoms whose product it is, outermost first; () is a size-1 dimension


@dataclass(frozen=True)
class Use:
    """How one node treats a token axis.

    kind: "pointwise", "mixes" (attention), "pools" (mean, max), "selects" (class token), "positions" (adds or cuts per-token constants),
    "appends" (cat along the axis), "bakes_length", "returns" (an output of the graph has this axis), "opaque".
    reason: a sentence for those that forbid shortening; empty where the length can be derived again (a view that names it).
    """

    node: str
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class TokenAxis:
    """An axis that attention mixes, or to whose places merged tokens are brought back.

    mixers: names of attention nodes whose queries and keys both run over it, in order, or over all tokens while their results are brought down to it;
    family: numbers of the atoms whose length depends on its length."""

    atom: Atom
    mixers: tuple[str, ...]
    uses: tuple[Use, ...]
    causal: bool  # some mixer hides later tokens
    family: frozenset[int] = frozenset()


@dataclass(frozen=True)
class AxisFacts:
    maps: dict[str, AxisMap]  # node name -> its axes; absent: unknown (behind an opaque op)
    tokens: tuple[TokenAxis, ...]

    def dim(self, node: str, atom: Atom) -> int | None:
        """The dimension of that node's value that is exactly this atom."""
        found = [i for i, atoms in enumerate(self.maps.get(node, ())) if atoms == (atom,)]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Block:
    """A region between two values of the residual stream.

    name: stable, made of node names; kind: "attention", "feed_forward", "other"; layout: "pre", "post", "sandwich", "parallel";
    before, after: the stream's nodes around it (of one type); nodes: all that is computed only for `after`, topological order;
    branch: for pre-norm layouts the node that is added to `before`.
    """

    name: str
    kind: str
    layout: str
    before: str
    after: str
    nodes: tuple[str, ...]
    branch: str | None = None


@dataclass(frozen=True)
class Stream:
    """One chain of values of one type that carries the model's state. layers: groups of consecutive blocks that repeat."""

    values: tuple[str, ...]
    blocks: tuple[Block, ...]
    layers: tuple[tuple[str, ...], ...] = ()  # names of the blocks of each layer


@dataclass(frozen=True)
class Repetition:
    """Isomorphic regions. classes: for each class its regions, each a tuple of node names in one order."""

    classes: tuple[tuple[tuple[str, ...], ...], ...] = ()

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """(class, place within its region) of every node that is part of a region."""
        return {name: (kind, place) for kind, regions in enumerate(self.classes) for region in regions for place, name in enumerate(region)}


@dataclass(frozen=True)
class Facts:
    axes: AxisFacts
    streams: tuple[Stream, ...] = ()
    repetition: Repetition = field(default_factory=Repetition)
