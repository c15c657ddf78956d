"""Fewer tokens for the rest of the graph."""

from paretorch.rewrites.rule import Rule
from paretorch.rewrites.token_merging import (
    divprune,
    drop_masked_tokens,
    dymu,
    evit,
    merge_frames,
    pitome,
    tempme,
    tofu,
    toma,
    tome,
    tomesd,
    visionzip,
)

RULES: tuple[Rule, ...] = (
    tome.RULE, pitome.RULE, tofu.RULE, dymu.RULE, evit.RULE, divprune.RULE, visionzip.RULE, merge_frames.RULE, tempme.RULE,
    drop_masked_tokens.RULE, tomesd.RULE, toma.RULE,
)  # fmt: skip
