"""Products with weights of eight bits.

int8_linear(x: T[..., K], weight: i8[N, K], scale: f32[N, G], bias: T[N]?) -> T[..., N], x @ W^T + bias

where W[n, k] = weight[n, k] * scale[n, k // (K / G)]: symmetric, one scale for each group of a row. Runtimes that know this form multiply integers and
round x to eight bits as well, each row or group of it by its own largest number; what that adds to the error is in the drop that a plan is
accepted by, since that is measured on the runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paretorch.ir.ops.costs import inputs_and_output
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.matrix import product_flops
from paretorch.ir.ops.table import Op, OpTemplate, define

LARGEST = 127
GROUPS = (64, 32, 16)  # lengths of groups that runtimes multiply fast; the first that divides a row is taken


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: T[..., K], weight: i8[N, K], scale: f32[N, G], bias: T[N] -> T[..., N]; torch widens the weights in each call."""
    return F.linear(x, widened_weight(weight, scale, x.dtype), bias)


def widened_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W of the card, in a floating type."""
    grouped = weight.to(dtype).reshape(weight.shape[0], scale.shape[1], -1)
    return (grouped * scale.to(dtype)[:, :, None]).reshape(weight.shape)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """f32[N, K] -> (i8[N, K], f32[N, G]): each group rounded to steps of its largest number / 127; a group of zeros has a scale of one."""
    grouped = _grouped(weight)
    largest = grouped.abs().amax(2)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (grouped / scale[:, :, None]).round().to(torch.int8).reshape(weight.shape), scale


def coarse_share(weight: Tensor) -> float:
    """The share of groups of f32[N, K] in which one number is so large that a step is more than half of the median number."""
    sizes = _grouped(weight).abs()
    return float((sizes.amax(2) / LARGEST > sizes.median(2)[0] / 2).double().mean())


def _grouped(weight: Tensor) -> Tensor:
    """[N, K] -> [N, G, K / G], one group a row where no length of GROUPS divides it."""
    rows, width = weight.shape
    length = next((length for length in GROUPS if width % length == 0), width)
    return weight.reshape(rows, -1, length)


SCHEMAS = {"int8_linear": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor"}
LIBRARY.define("int8_linear" + SCHEMAS["int8_linear"])
LIBRARY.impl("int8_linear", int8_linear, "CompositeImplicitAutograd")

define(Op(
    name="int8_linear", targets=(torch.ops.paretorch.int8_linear.default,), kind="matrix", flops=product_flops, bytes=inputs_and_output,
    axes="linear", onnx="int8_linear", definition=int8_linear,
    triton=OpTemplate("product", (("x", "x"), ("weight", "weight"), ("scale", "scale"), ("bias", "bias"))),
))  # fmt: skip
