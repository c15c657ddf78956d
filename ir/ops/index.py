"""Rows that gather, scatter or make tensors from sizes."""

from __future__ import annotations

from paretorch.ir.ops.costs import output_only, output_twice, zero
from paretorch.ir.ops.table import Missing, Op, aten, define


def _index(name: str, overloads: str, axes: str | None, onnx: str | Missing) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="gather", flops=zero,
        bytes=output_twice, axes=axes, onnx=onnx,
    ))  # fmt: skip


def _create(name: str, overloads: str, onnx: str | Missing) -> None:
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
_index("index_add", "index_add.default", "index", "ScatterND")
_index("index_fill", "index_fill.int_Scalar index_fill.int_Tensor", "index", "ScatterND")
_index("scatter_reduce", "scatter_reduce.two scatter.reduce scatter.value_reduce", "index", "ScatterElements")
_index("select_scatter", "select_scatter.default", "index", "ScatterND")
_index("masked_scatter", "masked_scatter.default", None, "ScatterND")
_index("take_along_dim", "take_along_dim.default", None, "GatherElements")
_index("embedding_bag", "embedding_bag.padding_idx", None, Missing("spelled out: a lookup and sums"))
_index("repeat_rows", "repeat_interleave.self_Tensor", None, Missing("repeats that depend on data"))
_index("searchsorted", "searchsorted.Tensor bucketize.Tensor", None, Missing("spelled out: comparisons and a sum"))
_index("one_hot", "one_hot.default", None, "OneHot")
_index("slice_scatter", "slice_scatter.default", "index", "ScatterND")
_create("arange", "arange.default arange.start arange.start_step", "Range")
_create("full", "full.default full_like.default new_full.default", "ConstantOfShape")
_create("zeros", "zeros.default zeros_like.default new_zeros.default", "ConstantOfShape")
_create("ones", "ones.default ones_like.default new_ones.default", "ConstantOfShape")
_create("scalar_tensor", "scalar_tensor.default", "Constant")
_create("empty", "empty.memory_format empty_like.default new_empty.default", "ConstantOfShape")
_create("eye", "eye.default eye.m", "EyeLike")
_create("linspace", "linspace.default", "Range")
_create("tril_indices", "tril_indices.default triu_indices.default", Missing("a constant once its sizes are known"))
