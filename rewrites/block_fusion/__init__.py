"""Exact rewrites of blocks."""

from paretorch.rewrites.block_fusion import (
    drop_key_bias,
    fold_conv_batch_norm,
    fold_norm_affine,
    fold_scale,
    fold_value_bias,
    pack_linears,
)
from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = (
    fold_conv_batch_norm.RULE,
    fold_scale.RULE,  # before the norms: a scaled linear takes the norm's affine all the same
    drop_key_bias.RULE,  # before packing, which would give the key a bias of zeros again only if another part has one
    fold_value_bias.RULE,
    fold_norm_affine.RULE,
    pack_linears.RULE,  # last: it hides the single projections
)
