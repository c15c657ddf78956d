"""Rules: a name, where it may act, what it puts there, and facts about it.

A local rule gives `pattern`, `legality` and `replacement`, see `paretorch.rewrites.match`; one without a local pattern gives `sites` and `rewrite`.
Sites of an exact rule read the graph alone and get empty facts, so that no analysis runs for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from paretorch.ir.analyze import Facts
from paretorch.ir.graph import Graph

FAMILIES = ("block_fusion", "token_merging", "layer_skipping", "sparse_attention", "precision")

# What a rewrite may read or invalidate; two rewrites conflict if one invalidates what the other reads downstream of it.
PROPERTIES = ("positions", "token_count", "grid", "batch_independence", "cache", "heads")

Knob = int | float | str | None


def level(knob: Knob) -> Knob:
    """The number that a value is or begins with, by which values that were measured for different places compare; else the value itself."""
    try:
        return float(knob.split()[0]) if isinstance(knob, str) else knob
    except ValueError:
        return knob


@dataclass(frozen=True)
class Exact:
    """The same function over the reals."""


@dataclass(frozen=True)
class Lossy:
    """Another function. knob: what it is called; values: the first is the identity, then weaker to stronger."""

    knob: str
    values: tuple[Knob, ...]


MODEL = "model"  # the name of the site that is everything a rule can reach
JOIN = "+"  # between the nodes that name a site
SPAN = ".."  # between the first and the last node of a site that is a region
_BETWEEN = re.compile(r"\+|\.\.|->")  # these, and what stands between the two values of the stream that name a block


@dataclass(frozen=True)
class Site:
    """Where a rule may act. name: stable under other rewrites, made of node names; label: the place in the user's model."""

    name: str
    label: str = ""
    values: tuple[Knob, ...] | None = None  # knob values legal here; None for all of the rule's

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the nodes that its name is made of, as it lists them; MODEL stands for itself."""
        return tuple(_BETWEEN.split(self.name))


@dataclass(frozen=True)
class Refusal:
    """Why a rule may not act at a place; reason is a sentence with the values in it."""

    rule: str
    site: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """name: verb_object, or the published name. saves: what shrinks ("flops", "bytes", "launches", "memory").

    calibrate: (graph, sites, batches of its flat inputs) -> the same sites with values that were measured on these, as many of the same levels.
    shares_inner: whether inner values of a local match may have users outside of it; those then stay computed beside the replacement.
    """

    name: str
    family: str
    effect: Exact | Lossy
    saves: tuple[str, ...]
    source: str
    example: Callable[..., Graph]
    pattern: Callable[..., Any] | None = None
    legality: Callable[..., str | None] | None = None
    replacement: Callable[..., Any] | None = None
    sites: Callable[[Graph, Facts], Iterable[Site | Refusal]] | None = None
    rewrite: Callable[[Graph, Site, Knob], Graph] | None = None
    calibrate: Callable[[Graph, Sequence[Site], Sequence[Sequence[Tensor]]], Sequence[Site]] | None = None
    shares_inner: bool = False
    reads: frozenset[str] = field(default_factory=frozenset)
    invalidates: frozenset[str] = field(default_factory=frozenset)

    @property
    def is_exact(self) -> bool:
        return isinstance(self.effect, Exact)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """All knob values, the identity first; (None,) for an exact rule."""
        return self.effect.values if isinstance(self.effect, Lossy) else (None,)
