"""Rows of convolutions, pooling and resizing: ops on spatial axes."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from paretorch.ir.ops.costs import inputs_and_output, operands, output, per_element
from paretorch.ir.ops.table import Op, aten, define


def convolution_flops(node: Node) -> Any:
    """Two per output element, per input channel of its group, per tap. weight: [C_out, C_in / groups, *taps]."""
    weight = operands(node)[1].shape
    return 2 * output(node).numel * prod(weight[1:])


def transposed_convolution_flops(node: Node) -> Any:
    """Two per input element, per output channel of its group, per tap. weight: [C_in, C_out / groups, *taps]."""
    x, weight = operands(node)[:2]
    return 2 * x.numel * prod(weight.shape[1:])


def pool_flops(node: Node) -> Any:
    """One per element of each window."""
    window = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return output(node).numel * prod(window)


def _spatial(name: str, overloads: str, kind: str, flops: Any, onnx: str) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind=kind, flops=flops,
        bytes=inputs_and_output, axes="spatial", onnx=onnx,
    ))  # fmt: skip


_spatial("convolution", "conv2d.default conv1d.default conv3d.default convolution.default conv2d.padding conv1d.padding",
         "convolution", convolution_flops, "Conv")  # fmt: skip
_spatial("conv_transpose", "conv_transpose2d.input conv_transpose1d.default", "convolution", transposed_convolution_flops, "ConvTranspose")
_spatial("max_pool", "max_pool2d.default max_pool1d.default", "reduce", pool_flops, "MaxPool")
_spatial("avg_pool", "avg_pool2d.default avg_pool1d.default", "reduce", pool_flops, "AveragePool")
_spatial("adaptive_avg_pool", "adaptive_avg_pool2d.default adaptive_avg_pool1d.default _adaptive_avg_pool2d.default", "reduce",
         lambda node: operands(node)[0].numel, "AveragePool")  # fmt: skip
_spatial("upsample_bilinear", "upsample_bilinear2d.vec upsample_bilinear2d.default", "copy", per_element(8), "Resize")
_spatial("upsample_nearest", "upsample_nearest2d.vec upsample_nearest2d.default", "copy", per_element(0), "Resize")
