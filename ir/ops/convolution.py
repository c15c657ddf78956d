"""Rows of convolutions, pooling and resizing: ops on spatial axes."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, operands, output, per_element, type_of_argument
from paretorch.ir.ops.table import Missing, Op, aten, define


def convolution_flops(node: Node) -> Any:
    """Two per output element, per input channel of its group, per tap. weight: [C_out, C_in / groups, *taps]."""
    if arguments(node).get("transposed"):
        return transposed_convolution_flops(node)
    return 2 * output(node).numel * prod(type_of_argument(node, "weight").shape[1:])


def transposed_convolution_flops(node: Node) -> Any:
    """Two per input element, per output channel of its group, per tap. weight: [C_in, C_out / groups, *taps]."""
    return 2 * type_of_argument(node, "input").numel * prod(type_of_argument(node, "weight").shape[1:])


def pool_flops(node: Node) -> Any:
    """One per element of each window; a window of one number has that length along each spatial axis."""
    given = arguments(node)["kernel_size"]
    window = given if isinstance(given, (list, tuple)) else [given]
    spatial = next(count for count in (1, 2, 3) if f"{count}d" in str(node.target))
    return output(node).numel * prod(window if len(window) == spatial else [window[0]] * spatial)


def _spatial(name: str, overloads: str, kind: str, flops: Any, onnx: str | Missing, axes: str | None = "spatial") -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind=kind, flops=flops,
        bytes=inputs_and_output, axes=axes, onnx=onnx,
    ))  # fmt: skip


_spatial("convolution", "conv2d.default conv1d.default conv3d.default convolution.default conv2d.padding conv1d.padding conv3d.padding",
         "convolution", convolution_flops, "Conv")  # fmt: skip
_spatial("conv_transpose", "conv_transpose2d.input conv_transpose1d.default conv_transpose3d.input", "convolution",
         transposed_convolution_flops, "ConvTranspose")  # fmt: skip
_spatial("max_pool", "max_pool2d.default max_pool1d.default max_pool3d.default", "reduce", pool_flops, "MaxPool")
_spatial("max_pool_places", "max_pool2d_with_indices.default max_pool1d_with_indices.default", "reduce", pool_flops, "MaxPool", None)
_spatial("avg_pool", "avg_pool2d.default avg_pool1d.default avg_pool3d.default", "reduce", pool_flops, "AveragePool")
_spatial("adaptive_avg_pool",
         "adaptive_avg_pool2d.default adaptive_avg_pool1d.default _adaptive_avg_pool2d.default adaptive_avg_pool3d.default", "reduce",
         lambda node: operands(node)[0].numel, "AveragePool")  # fmt: skip
_spatial("adaptive_max_pool", "adaptive_max_pool2d.default adaptive_max_pool1d.default", "reduce",
         lambda node: operands(node)[0].numel, "MaxPool", None)  # fmt: skip
_spatial("upsample_bilinear", "upsample_bilinear2d.vec upsample_bilinear2d.default", "copy", per_element(8), "Resize")
_spatial("upsample_bicubic", "upsample_bicubic2d.vec upsample_bicubic2d.default", "copy", per_element(35), "Resize")
_spatial("upsample_linear", "upsample_linear1d.vec", "copy", per_element(3), "Resize")
_spatial("upsample_nearest", "upsample_nearest2d.vec upsample_nearest2d.default upsample_nearest1d.vec", "copy", per_element(0), "Resize")
_spatial("grid_sampler", "grid_sampler.default grid_sampler_2d.default", "gather", per_element(8), "GridSample", None)
_spatial("im2col", "im2col.default", "gather", per_element(0), Missing("no ONNX op takes windows apart"), None)
_spatial("col2im", "col2im.default", "gather", lambda node: operands(node)[0].numel, "Col2Im", None)
