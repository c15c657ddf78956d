"""Attention that leaves out pairs of tokens."""

from paretorch.rewrites.rule import Rule
from paretorch.rewrites.sparse_attention import sinks_window, sliding_window

RULES: tuple[Rule, ...] = (sliding_window.RULE, sinks_window.RULE)
