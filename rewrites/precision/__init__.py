"""Fewer bits."""

from paretorch.rewrites.precision import bf16
from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = (bf16.RULE,)
