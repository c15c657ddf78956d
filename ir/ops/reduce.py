"""Rows of reductions and of normalisations along rows."""

from __future__ import annotations

from typing import Any

from paretorch.ir.ops.costs import inputs_and_output, per_element, per_input_element
from paretorch.ir.ops.table import Op, aten, define


def _row(name: str, overloads: str, axes: str, flops: Any, onnx: str, kind: str = "row") -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind=kind, flops=flops,
        bytes=inputs_and_output, axes=axes, onnx=onnx,
    ))  # fmt: skip


_row("softmax", "softmax.int _softmax.default", "softmax", per_element(5), "Softmax")
_row("log_softmax", "log_softmax.int _log_softmax.default", "softmax", per_element(6), "LogSoftmax")
_row("layer_norm", "layer_norm.default", "last_axis", per_element(7), "LayerNormalization")
_row("rms_norm", "rms_norm.default", "last_axis", per_element(4), "RMSNormalization")
_row("group_norm", "group_norm.default", "spatial", per_element(7), "GroupNormalization")
_row("batch_norm", "batch_norm.default _native_batch_norm_legit_no_training.default", "spatial", per_element(4), "BatchNormalization")
_row("mean", "mean.dim mean.default", "reduce", per_input_element(1), "ReduceMean", "reduce")
_row("sum", "sum.dim_IntList sum.default", "reduce", per_input_element(1), "sum", "reduce")
_row("amax", "amax.default", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("amin", "amin.default", "reduce", per_input_element(1), "ReduceMin", "reduce")
_row("max_dim", "max.dim", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("argmax", "argmax.default", "reduce", per_input_element(1), "ArgMax", "reduce")
_row("var", "var.correction var.dim", "reduce", per_input_element(4), "ReduceMean", "reduce")
_row("norm", "linalg_vector_norm.default", "reduce", per_input_element(2), "ReduceL2", "reduce")
_row("cumsum", "cumsum.default", "scan", per_input_element(1), "CumSum", "reduce")
_row("topk", "topk.default", "scan", per_input_element(4), "TopK", "reduce")
_row("argsort", "argsort.default argsort.stable", "scan", per_input_element(8), "TopK", "reduce")
_row("sort", "sort.default sort.stable", "scan", per_input_element(8), "TopK", "reduce")
