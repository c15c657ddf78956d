"""Layers, or halves of layers, that are left out."""

from paretorch.rewrites.layer_skipping import skip_attention, skip_block, skip_feed_forward
from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = (skip_block.RULE, skip_attention.RULE, skip_feed_forward.RULE)
