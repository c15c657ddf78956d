"""Products with weights of eight or four bits.

int8_linear(x: T[..., K], weight: i8[N, K], scale: f32[N, G], bias: T[N]?) -> T[..., N], x @ W^T + bias
int4_linear(x: T[..., K], weight: u8[N, G, K / G / 2], scale: f32[N, G], bias: T[N]?) -> T[..., N], the same

where W[n, k] = q[n, k] * scale[n, k // (K / G)]: symmetric, one scale for each group of a row. Of eight bits q is the weight; of four, -8 to 7, each
byte holds two of a row that follow one another, the first in its low bits, both plus 8, as ONNX Runtime has them. Runtimes that know these forms
multiply integers and round x to eight bits as well, each row or group of it by its own largest number; what that adds to the error is in the drop that
a plan is accepted by, since that is measured on the runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.ops.costs import inputs_and_output
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.matrix import product_flops
from paretorch.ir.ops.table import Op, OpTemplate, define, op_of

LARGEST = 127
GROUPS = (64, 32, 16)  # lengths of groups that runtimes multiply fast; the first that divides a row is taken
ZERO = 8  # what zero is kept as in four bits
SHARES = (1.0, 0.925, 0.85, 0.775)  # of a group's largest number, which its steps may span
AT_ONCE = 1 << 22  # numbers that are rounded together


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: T[..., K], weight: i8[N, K], scale: f32[N, G], bias: T[N] -> T[..., N]; torch widens the weights in each call."""
    return F.linear(x, widened_int8(weight, scale, x.dtype), bias)


def int4_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: T[..., K], weight: u8[N, G, K / G / 2], scale: f32[N, G], bias: T[N] -> T[..., N]; torch unpacks and widens the weights in each call."""
    return F.linear(x, widened_int4(weight, scale, x.dtype), bias)


def widened_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W of the card, in a floating type."""
    grouped = weight.to(dtype).reshape(weight.shape[0], scale.shape[1], -1)
    return (grouped * scale.to(dtype)[:, :, None]).reshape(weight.shape)


def widened_int4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W of the card, in a floating type. The two numbers of each byte are looked up, in a third of the time that masks and shifts take torch."""
    byte = torch.arange(256, device=weight.device)
    numbers = torch.stack((byte % 16, byte // 16), 1).to(dtype) - ZERO
    return (F.embedding(weight.int(), numbers).flatten(2) * scale.to(dtype)[:, :, None]).flatten(1)


def quantized_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """f32[N, K] -> (i8[N, K], f32[N, G]): each group rounded to steps of its largest number / 127; a group of zeros has a scale of one."""
    grouped = _grouped(weight, _length(weight))
    largest = grouped.abs().amax(2)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (grouped / scale[:, :, None]).round().to(torch.int8).reshape(weight.shape), scale


def quantized_int4(weight: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """f32[N, K] -> (u8[N, K / length, length / 2], f32[N, K / length]): each group rounded to steps of its largest number / -8, or of one of SHARES of
    that, whichever leaves the least squared error. So the largest number, whatever its sign, is the last of the 16, or beyond. A group of zeros has a
    scale of one.

    Measured on all linears of all-MiniLM-L6-v2, 40 sentences, 2026-11-22: relative error of embeddings with groups of 32, 64, 128: 0.254, 0.279,
    0.297. Without SHARES 0.298 for 64. With a zero point for each group 0.235, 0.267, 0.288: for 64 and 128 less than the next shorter groups
    bring, and OpenVINO multiplies in f32 where the count of groups is odd.
    """
    rows = max(1, AT_ONCE // max(weight.shape[1], 1))
    parts = [_rounded_int4(_grouped(part, length)) for part in weight.split(rows)]
    values, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    return values, scales


def _rounded_int4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """f32[n, G, L] -> (u8[n, G, L / 2], f32[n, G])."""
    widest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)) / -ZERO
    widest = torch.where(widest != 0, widest, torch.ones_like(widest))
    scale, least = widest, torch.full_like(widest, float("inf"))
    for share in SHARES:
        tried = widest * share
        error = ((grouped / tried).round_().clamp_(-ZERO, ZERO - 1) * tried - grouped).square_().sum(2, keepdim=True)
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    values = ((grouped / scale).round_().clamp_(-ZERO, ZERO - 1) + ZERO).to(torch.uint8)
    return values[..., ::2] | values[..., 1::2] << 4, scale[..., 0]


def coarse_share(weight: Tensor, length: int | None = None, steps: float = LARGEST, most: float = 0.5) -> float:
    """The share of groups of f32[N, K] in which one number is so large that a step, of which it has `steps`, is more than `most` of the median."""
    sizes = _grouped(weight, length or _length(weight)).abs()
    return float((sizes.amax(2) / steps > sizes.median(2)[0] * most).double().mean())


def _length(weight: Tensor) -> int:
    """How many numbers of a row of f32[N, K] share a scale of eight bits: all of it where no length of GROUPS divides it."""
    return next((length for length in GROUPS if weight.shape[1] % length == 0), weight.shape[1])


def _grouped(weight: Tensor, length: int) -> Tensor:
    """[N, K] -> [N, G, length]."""
    return weight.reshape(weight.shape[0], -1, length)


@dataclass(frozen=True)
class Rounding:
    """How an op keeps its weights. name: of the type; widened: (weight, scale, dtype) -> W of the card."""

    name: str
    widened: Callable[[Tensor, Tensor, torch.dtype], Tensor]


ROUNDINGS = {"int8_linear": Rounding("int8", widened_int8), "int4_linear": Rounding("int4", widened_int4)}


def rounding_of(node: Node) -> Rounding | None:
    """How this call keeps its weights; None for ops that keep them as they are multiplied."""
    op = op_of(node)
    return ROUNDINGS.get(op.name) if op is not None else None


def _define(name: str, definition: Callable[..., Tensor], weight: str) -> None:
    """weight: the role that the template of products gives it."""
    schema = f"{name}(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor"
    LIBRARY.define(schema)
    LIBRARY.impl(name, definition, "CompositeImplicitAutograd")
    define(Op(
        name=name, targets=(getattr(torch.ops.paretorch, name).default,), kind="matrix", flops=product_flops, bytes=inputs_and_output,
        axes="linear", onnx=name, definition=definition,
        triton=OpTemplate("product", (("x", "x"), (weight, "weight"), ("scale", "scale"), ("bias", "bias"))),
    ))  # fmt: skip


_define("int8_linear", int8_linear, "weight")
_define("int4_linear", int4_linear, "packed_weight")
