"""Composite ops that one kernel of ours computes in one pass; torch and ONNX runtimes see through them to their parts.

add_layer_norm(x: T[...,C], residual: T[...,C], normalized_shape, weight?, bias?, eps) -> (layer_norm(x + residual), x + residual)
add_rms_norm(x: T[...,C], residual: T[...,C], normalized_shape, weight?, eps?)         -> (rms_norm(x + residual), x + residual)
linear_activation(x: T[...,C], weight: T[D,C], bias: T[D]?, activation)                -> activation(linear(x, weight, bias)): T[...,D]
gated(gate: T[...,C], up: T[...,C], activation)                                        -> activation(gate) * up

Each reads its operands once and writes its outputs once, which is what the bytes column says: the sum, the linear's output and the activated gate
never travel to memory and back on their own. activation: a key of ACTIVATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, output
from paretorch.ir.ops.library import LIBRARY
from paretorch.ir.ops.matrix import product_flops
from paretorch.ir.ops.table import Missing, Op, define, row

ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {  # the row and the attributes of each
    "gelu": ("gelu", {}),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}),
    "silu": ("silu", {}),
    "relu": ("relu", {}),
    "hardswish": ("hardswish", {}),
    "sigmoid": ("sigmoid", {}),
    "tanh": ("tanh", {}),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name."""
    name, attributes = ACTIVATIONS[activation]
    activated: Tensor = row(name).targets[0](x, **attributes)
    return activated


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The layer norm of the sum, and the sum."""
    total = x + residual
    return F.layer_norm(total, list(normalized_shape), weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The RMS norm of the sum, and the sum."""
    total = x + residual
    return F.rms_norm(total, list(normalized_shape), weight, eps), total


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """The activation of a linear's output."""
    return activate(F.linear(x, weight, bias), activation)


def gated(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """The gate of SwiGLU (silu) and GeGLU (gelu, gelu_tanh)."""
    return activate(gate, activation) * up


SCHEMAS = {
    "add_layer_norm": "(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
    "-> (Tensor, Tensor)",
    "add_rms_norm": "(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> (Tensor, Tensor)",
    "linear_activation": "(Tensor x, Tensor weight, Tensor? bias=None, *, str activation) -> Tensor",
    "gated": "(Tensor gate, Tensor up, *, str activation='silu') -> Tensor",
}
for _function in (add_layer_norm, add_rms_norm, linear_activation, gated):
    LIBRARY.define(_function.__name__ + SCHEMAS[_function.__name__])
    LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")


def activation_flops(node: Node) -> Any:
    """As the activation's own row counts them."""
    name, _ = ACTIVATIONS[arguments(node)["activation"]]
    return row(name).flops(node)


def add_norm_flops(norm: str) -> Callable[[Node], Any]:
    """A sum and the norm, as the norm's own row counts it."""
    return lambda node: output(node).numel + row(norm).flops(node)


def linear_activation_flops(node: Node) -> Any:
    return product_flops(node) + activation_flops(node)


def gated_flops(node: Node) -> Any:
    return activation_flops(node) + output(node).numel


SPELLED_OUT = Missing("exported by its definition: the ops that it joins")
define(Op(
    name="add_layer_norm", targets=(torch.ops.paretorch.add_layer_norm.default,), kind="row", flops=add_norm_flops("layer_norm"),
    bytes=inputs_and_output, onnx=SPELLED_OUT, source="arXiv:2410.10989",
))  # fmt: skip
define(Op(
    name="add_rms_norm", targets=(torch.ops.paretorch.add_rms_norm.default,), kind="row", flops=add_norm_flops("rms_norm"),
    bytes=inputs_and_output, onnx=SPELLED_OUT, source="arXiv:2410.10989",
))  # fmt: skip
define(Op(
    name="linear_activation", targets=(torch.ops.paretorch.linear_activation.default,), kind="matrix", flops=linear_activation_flops,
    bytes=inputs_and_output, axes="linear", onnx=SPELLED_OUT,
))  # fmt: skip
define(Op(
    name="gated", targets=(torch.ops.paretorch.gated.default,), kind="elementwise", flops=gated_flops, bytes=inputs_and_output,
    axes="pointwise", onnx=SPELLED_OUT, source="arXiv:2002.05202",
))  # fmt: skip
