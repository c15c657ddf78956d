"""Products with weights of eight bits.

int8_linear(x: T[..., K], weight: i8[N, K], scale: f32[N], bias: T[N]?) -> T[..., N], x @ (weight * scale[:, None])^T + bias

Symmetric, one scale for each output. Runtimes that know this form multiply integers and round x to eight bits as well, each row or group of it by
its own largest number; what that adds to the error is in the drop that a plan is accepted by, since that is measured on the runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paretorch.ir.ops.costs import inputs_and_output
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.matrix import product_flops
from paretorch.ir.ops.table import Missing, Op, define

LARGEST = 127


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: T[..., K], weight: i8[N, K], scale: f32[N], bias: T[N] -> T[..., N]; torch widens the weights in each call."""
    return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype)[:, None], bias)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """f32[N, K] -> (i8[N, K], f32[N]): each row rounded to steps of its largest number / 127; a row of zeros has a scale of one."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (weight / scale[:, None]).round().to(torch.int8), scale


SCHEMAS = {"int8_linear": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor"}
LIBRARY.define("int8_linear" + SCHEMAS["int8_linear"])
LIBRARY.impl("int8_linear", int8_linear, "CompositeImplicitAutograd")

define(Op(
    name="int8_linear", targets=(torch.ops.paretorch.int8_linear.default,), kind="matrix", flops=product_flops, bytes=inputs_and_output,
    axes="linear", onnx="int8_linear", triton=Missing("runs as torch: a cast, two products"), definition=int8_linear,
))  # fmt: skip
