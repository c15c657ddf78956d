"""Exact rewrites of blocks."""

from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = ()
