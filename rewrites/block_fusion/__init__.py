"""Exact rewrites of blocks."""

from paretorch.rewrites.block_fusion import (
    drop_key_bias,
    fold_batch_norm_affine,
    fold_conv_batch_norm,
    fold_norm_affine,
    fold_scale,
    fold_shift,
    fold_value_bias,
    hoist_scale,
    merge_linears,
    pack_linears,
)
from paretorch.rewrites.rule import Rule

RULES: tuple[Rule, ...] = (
    fold_conv_batch_norm.RULE,
    fold_batch_norm_affine.RULE,  # only norms that had no convolution to go into
    fold_scale.RULE,  # before the norms: a scaled linear takes the norm's affine all the same
    hoist_scale.RULE,  # what no linear took
    fold_shift.RULE,
    merge_linears.RULE,  # after scales and shifts, which would stand between
    drop_key_bias.RULE,  # before packing, which would give the key a bias of zeros again only if another part has one
    fold_value_bias.RULE,
    fold_norm_affine.RULE,
    pack_linears.RULE,  # last: it hides the single projections
)
