"""Rows of numbers computed from sizes, and of taking one output of several."""

from __future__ import annotations

import math
import operator

import torch

from paretorch.ir.ops.costs import zero
from paretorch.ir.ops.table import Op, Target, define


def _scalar(name: str, *targets: Target) -> None:
    define(Op(name=name, targets=targets, kind="scalar", flops=zero, bytes=zero, axes="scalar"))


_scalar("sym_stride", torch.ops.aten.sym_stride.int)
_scalar("sym_size", torch.ops.aten.sym_size.int)
_scalar("sym_numel", torch.ops.aten.sym_numel.default)
_scalar("int_add", operator.add)
_scalar("int_sub", operator.sub)
_scalar("int_mul", operator.mul)
_scalar("int_floordiv", operator.floordiv)
_scalar("int_mod", operator.mod)
_scalar("int_neg", operator.neg)
_scalar("float_div", operator.truediv)
_scalar("int_pow", operator.pow)
_scalar("int_and", operator.and_)
_scalar("int_or", operator.or_)
_scalar("int_floor", math.floor)
_scalar("int_ceil", math.ceil)
_scalar("int_trunc", math.trunc)
_scalar("sym_float", torch.sym_float)
_scalar("sym_not", torch.sym_not)
_scalar("int_ne", operator.ne)
_scalar("int_eq", operator.eq)
_scalar("int_ge", operator.ge)
_scalar("int_le", operator.le)
_scalar("int_gt", operator.gt)
_scalar("int_lt", operator.lt)
_scalar("sym_max", torch.sym_max)
_scalar("sym_min", torch.sym_min)
_scalar("getitem", operator.getitem)
