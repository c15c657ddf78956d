"""Fewer tokens for the rest of the graph."""

from paretorch.rewrites.rule import Rule
from paretorch.rewrites.token_merging import tome

RULES: tuple[Rule, ...] = (tome.RULE,)
