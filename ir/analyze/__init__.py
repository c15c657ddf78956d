"""Analyses of a normalized graph: token axes, the residual stream, repetition."""

from paretorch.ir.analyze.axes import axis_of, token_axes
from paretorch.ir.analyze.facts import Atom, AxisFacts, AxisMap, Block, Facts, Repetition, Stream, TokenAxis, Use
from paretorch.ir.analyze.lengths import rederive_lengths
from paretorch.ir.analyze.repetition import repetition
from paretorch.ir.analyze.residual import residual_streams
from paretorch.ir.graph import Graph

__all__ = ["Atom", "AxisFacts", "AxisMap", "Block", "Facts", "Repetition", "Stream", "TokenAxis", "Use"]
__all__ += ["analyze", "axis_of", "rederive_lengths", "repetition", "residual_streams", "token_axes"]


def analyze(graph: Graph) -> Facts:
    """All facts of a graph; its nodes have types."""
    streams = residual_streams(graph)
    return Facts(token_axes(graph), streams, repetition(graph, streams))
