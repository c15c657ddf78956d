"""Rows of reductions and of normalisations along rows."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from paretorch.ir.ops.costs import inputs_and_output, operands, output, per_element, per_element_and_affine, per_input_element
from paretorch.ir.ops.row_text import ROW_TEXTS
from paretorch.ir.ops.table import Missing, Op, aten, define


def distance_flops(node: Node) -> Any:
    """A difference, a power and a sum for each pair of rows and each column."""
    return 3 * output(node).numel * operands(node)[0].shape[-1]


def _row(name: str, overloads: str, axes: str | None, flops: Any, onnx: str | Missing, kind: str = "row") -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind=kind, flops=flops,
        bytes=inputs_and_output, axes=axes, onnx=onnx, triton=ROW_TEXTS.get(name, Missing("no Triton text yet: runs as torch")),
    ))  # fmt: skip


NORM = per_element_and_affine(5)  # a sum, a difference, a square, a sum, a quotient
RMS_NORM = per_element_and_affine(3)  # a square, a sum, a quotient
BATCH_NORM = per_element_and_affine(2)  # a difference, a quotient: its statistics are constants

_row("softmax", "softmax.int _softmax.default", "softmax", per_element(5), "Softmax")
_row("log_softmax", "log_softmax.int _log_softmax.default", "softmax", per_element(5), "LogSoftmax")
_row("safe_softmax", "_safe_softmax.default", "softmax", per_element(5), "Softmax")
_row("layer_norm", "layer_norm.default", "last_axis", NORM, "LayerNormalization")
_row("rms_norm", "rms_norm.default", "last_axis", RMS_NORM, "RMSNormalization")
_row("group_norm", "group_norm.default", "spatial", NORM, "GroupNormalization")
_row("batch_norm", "batch_norm.default _native_batch_norm_legit_no_training.default", "spatial", BATCH_NORM, "batch_norm")
_row("instance_norm", "instance_norm.default", None, NORM, "InstanceNormalization")
_row("native_layer_norm", "native_layer_norm.default", None, NORM, "LayerNormalization")
_row("native_group_norm", "native_group_norm.default", None, NORM, "GroupNormalization")
_row("weight_norm", "_weight_norm.default", None, per_element(4), Missing("spelled out: a norm, a division and a product"))
_row("mean", "mean.dim mean.default", "reduce", per_input_element(1), "ReduceMean", "reduce")
_row("sum", "sum.dim_IntList sum.default", "reduce", per_input_element(1), "sum", "reduce")
_row("amax", "amax.default", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("amin", "amin.default", "reduce", per_input_element(1), "ReduceMin", "reduce")
_row("max_dim", "max.dim", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("min_dim", "min.dim", "reduce", per_input_element(1), "ReduceMin", "reduce")
_row("max_all", "max.default", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("min_all", "min.default", "reduce", per_input_element(1), "ReduceMin", "reduce")
_row("argmax", "argmax.default", "reduce", per_input_element(1), "ArgMax", "reduce")
_row("argmin", "argmin.default", "reduce", per_input_element(1), "ArgMin", "reduce")
_row("any", "any.dim any.dims any.default", "reduce", per_input_element(1), "ReduceMax", "reduce")
_row("all", "all.dim all.dims all.default", "reduce", per_input_element(1), "ReduceMin", "reduce")
_row("prod", "prod.dim_int prod.default", "reduce", per_input_element(1), "ReduceProd", "reduce")
_row("logsumexp", "logsumexp.default", "reduce", per_input_element(4), "ReduceLogSumExp", "reduce")
_row("var", "var.correction var.dim var.default", "reduce", per_input_element(4), "ReduceMean", "reduce")
_row("std", "std.correction std.dim std.default", "reduce", per_input_element(4), "ReduceMean", "reduce")
_row("var_mean", "var_mean.correction var_mean.dim", "reduce", per_input_element(4), "ReduceMean", "reduce")
_row("std_mean", "std_mean.correction std_mean.dim", "reduce", per_input_element(4), "ReduceMean", "reduce")
_row("norm", "linalg_vector_norm.default", "reduce", per_input_element(2), "ReduceL2", "reduce")
_row("cumsum", "cumsum.default", "scan", per_input_element(1), "CumSum", "reduce")
_row("cumprod", "cumprod.default", "scan", per_input_element(1), Missing("no ONNX op multiplies along an axis step by step"), "reduce")
_row("diff", "diff.default", None, per_element(1), "Sub", "reduce")
_row("cosine_similarity", "cosine_similarity.default", None, per_input_element(6), Missing("spelled out: norms and a product"), "reduce")
_row("cdist", "cdist.default", None, distance_flops, Missing("spelled out: differences and norms"), "reduce")
_row("topk", "topk.default", "scan", per_input_element(4), "TopK", "reduce")
_row("argsort", "argsort.default argsort.stable", "scan", per_input_element(8), "TopK", "reduce")
_row("sort", "sort.default sort.stable", "scan", per_input_element(8), "sort", "reduce")
