"""The op table. Importing this package fills it: one module per kind of op."""

from paretorch.ir.ops import (
    attention,
    convolution,
    elementwise,
    index,
    local_attention,
    matrix,
    reduce,
    scalar,
    shape,
    token_choice,
    tokens,
)
from paretorch.ir.ops.table import OPS, Missing, Op, RowText, aten, define, is_op, op_of, row

__all__ = ["OPS", "Missing", "Op", "RowText", "aten", "define", "is_op", "op_of", "row"]
__all__ += ["attention", "convolution", "elementwise", "index", "local_attention", "matrix", "reduce", "scalar", "shape"]
__all__ += ["token_choice", "tokens"]
