"""Analyses of a normalized graph: token axes, the residual stream, repetition."""

from paretorch.ir.analyze.axes import token_axes
from paretorch.ir.analyze.facts import Atom, AxisFacts, AxisMap, Block, Facts, Repetition, Stream, TokenAxis, Use

__all__ = ["Atom", "AxisFacts", "AxisMap", "Block", "Facts", "Repetition", "Stream", "TokenAxis", "Use", "token_axes"]
