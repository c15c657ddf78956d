"""Fewer bits."""

from paretorch.rewrites.precision import bf16, int4, int8
from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = (
    int4.RULE,  # a block of four bits, the rest of eight
    int8.RULE,
    bf16.RULE,  # what stays in f32 beside integers may still be cast
)
