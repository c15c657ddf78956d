"""Normalize: one spelling per idea, so that one pattern per idea is enough. An ordered tuple of passes, graph to graph."""

from __future__ import annotations

from collections.abc import Callable

from paretorch.ir.graph import Graph
from paretorch.rewrites.normalize.activations import activations
from paretorch.rewrites.normalize.aliases import aliases
from paretorch.rewrites.normalize.attention import raise_attention
from paretorch.rewrites.normalize.clean import clean
from paretorch.rewrites.normalize.contractions import contractions
from paretorch.rewrites.normalize.fold import fold, merge_equal
from paretorch.rewrites.normalize.linear import linear
from paretorch.rewrites.normalize.native_norms import native_norms
from paretorch.rewrites.normalize.norms import norms
from paretorch.rewrites.normalize.products import products
from paretorch.rewrites.normalize.scalars import scalars
from paretorch.rewrites.normalize.views import views
from paretorch.rewrites.normalize.weighted_softmax import weighted_softmax

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    aliases,  # so that no pass below needs to know them
    clean,  # copies and aliases would hide what is the same value
    linear,  # x @ weight.T before the transpose is folded away, so that the weight keeps its name and is not copied
    fold,  # masks and position tables become constants, which the passes below can read
    scalars,  # numbers on the right, as the patterns of norms and activations expect them
    clean,  # products with one
    views,  # one permute and one reshape where there was a chain
    contractions,
    linear,  # weights that were computed from constants
    merge_equal,
    native_norms,
    norms,
    activations,
    weighted_softmax,  # before attention is looked for: the factor becomes a mask
    raise_attention,  # needs scalars, views and constant masks
    products,  # attention knows einsums as they were written
    views,  # raising leaves permutes and reshapes that may cancel
    merge_equal,
    clean,
)


def normalize(graph: Graph) -> Graph:
    """The same function in canonical form; normalizing twice changes nothing more."""
    for step in PASSES:
        graph = step(graph)
    return graph
