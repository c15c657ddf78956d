"""Rows that gather, scatter or make tensors from sizes."""

from __future__ import annotations

from paretorch.ir.ops.costs import output_only, output_twice, zero
from paretorch.ir.ops.table import Op, aten, define


def _index(name: str, overloads: str, axes: str, onnx: str) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="gather", flops=zero,
        bytes=output_twice, axes=axes, onnx=onnx,
    ))  # fmt: skip


def _create(name: str, overloads: str, onnx: str) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="copy", flops=zero,
        bytes=output_only, axes="create", onnx=onnx,
    ))  # fmt: skip


_index("embedding", "embedding.default", "embedding", "Gather")
_index("gather", "gather.default", "gather", "GatherND")
_index("index_select", "index_select.default", "index_select", "Gather")
_index("index", "index.Tensor", "index", "GatherND")
_index("index_put", "index_put.default", "index", "ScatterND")
_index("index_copy", "index_copy.default", "index", "ScatterND")
_index("scatter", "scatter.src scatter.value", "index", "ScatterND")
_index("scatter_add", "scatter_add.default", "index", "ScatterND")
_index("slice_scatter", "slice_scatter.default", "index", "ScatterND")
_create("arange", "arange.default arange.start arange.start_step", "Range")
_create("full", "full.default full_like.default new_full.default", "ConstantOfShape")
_create("zeros", "zeros.default zeros_like.default new_zeros.default", "ConstantOfShape")
_create("ones", "ones.default ones_like.default new_ones.default", "ConstantOfShape")
_create("scalar_tensor", "scalar_tensor.default", "Constant")
