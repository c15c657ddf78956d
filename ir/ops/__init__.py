"""The op table. Importing this package fills it: one module per kind of op."""

from paretorch.ir.ops import (
    attention,
    clips,
    convolution,
    elementwise,
    index,
    local_attention,
    matrix,
    paged_attention,
    quantized,
    reduce,
    restore,
    scalar,
    scoped,
    shape,
    token_choice,
    token_context,
    token_ragged,
    tokens,
)
from paretorch.ir.ops.table import OPS, Missing, Op, OpTemplate, RowText, aten, define, is_op, op_of, row

# All that compute with tokens as a value: sizes and weights stay wide in them.
TOKEN_OPS: tuple[str, ...] = (
    *tokens.SCHEMAS,
    *token_choice.SCHEMAS,
    *token_context.SCHEMAS,
    *token_ragged.SCHEMAS,
    *restore.SCHEMAS,
    *scoped.SCHEMAS,
    *clips.SCHEMAS,
)

__all__ = ["OPS", "TOKEN_OPS", "Missing", "Op", "OpTemplate", "RowText", "aten", "define", "is_op", "op_of", "row"]
__all__ += [
    "attention",
    "clips",
    "convolution",
    "elementwise",
    "index",
    "local_attention",
    "matrix",
    "paged_attention",
    "quantized",
    "reduce",
]
__all__ += ["restore", "scalar", "scoped", "shape", "token_choice", "token_context", "token_ragged", "tokens"]
