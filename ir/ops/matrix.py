"""Rows of matrix products and of recurrent layers. What a bias adds is not counted, as in torch's own counter."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, output, tensors, value_type
from paretorch.ir.ops.table import Missing, Op, aten, define


def _operand(node: Node, place: int) -> Any:
    """The type of the argument at that place of the schema."""
    return tensors(value_type(list(arguments(node).values())[place]))[0]


def product_flops(node: Node) -> Any:
    """2 * m * k * n for every product: two per element of the output and of the contracted axis."""
    return 2 * output(node).numel * _operand(node, 0).shape[-1]


def biased_product_flops(node: Node) -> Any:
    """As product_flops, for bias + left @ right, where the bias is the first operand."""
    return 2 * output(node).numel * _operand(node, 1).shape[-1]


def summed_product_flops(node: Node) -> Any:
    """bias + sum over the batch of left @ right."""
    left = _operand(node, 1)
    return 2 * output(node).numel * left.shape[0] * left.shape[-1]


def _labels(term: str, rank: int) -> list[str]:
    """The index of each axis of an operand; those under an ellipsis are numbered from the right."""
    front, dots, back = term.replace(" ", "").partition("...")
    return [*front, *(f"...{place}" for place in reversed(range(rank - len(front) - len(back) if dots else 0))), *back]


def einsum_flops(node: Node) -> Any:
    """Two per combination of the indices of two operands, one if none of them is contracted; several operands are contracted from the left."""
    given = arguments(node)
    inputs, arrow, result = given["equation"].partition("->")
    shapes = [value_type(operand).shape for operand in given["tensors"]]  # type: ignore[union-attr]
    terms = [_labels(term, len(shape)) for term, shape in zip(inputs.split(","), shapes, strict=True)]
    sizes: dict[str, Any] = {}
    for label, size in (pair for term, shape in zip(terms, shapes, strict=True) for pair in zip(term, shape, strict=True)):
        sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    every = [label for term in terms for label in term]
    kept = {
        label for label in every if (label in result or label.startswith("...") if arrow else every.count(label) == 1 or "..." in label)
    }
    met, flops = set(terms[0]), 0
    for place, term in enumerate(terms[1:], 1):
        met |= set(term)
        left = met & kept.union(*terms[place + 1 :])
        flops = flops + (1 if left == met else 2) * prod(sizes[label] for label in sorted(met))
        met = left
    return flops


def recurrent_flops(node: Node) -> Any:
    """Each step of each sample meets every weight matrix once: 2 * B * T * (elements of all matrices)."""
    given = arguments(node)
    weights = [value_type(parameter) for parameter in given["params"]]
    return 2 * prod(_operand(node, 0).shape[:-1]) * sum(weight.numel for weight in weights if weight.rank == 2)  # type: ignore[union-attr]


def _product(name: str, overloads: str, axes: str | None, flops: Any = product_flops, onnx: str | Missing = "MatMul") -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="matrix",
        flops=flops, bytes=inputs_and_output, axes=axes, onnx=onnx,
    ))  # fmt: skip


_product("linear", "linear.default", "linear")
_product("matmul", "matmul.default", "matmul")
_product("mm", "mm.default", "matmul")
_product("bmm", "bmm.default", "matmul")
_product("addmm", "addmm.default", "addmm", biased_product_flops)
_product("baddbmm", "baddbmm.default", "addmm", biased_product_flops)
_product("mv", "mv.default dot.default", "matmul")
_product("addmv", "addmv.default", None, biased_product_flops)
_product("addbmm", "addbmm.default", None, summed_product_flops)
_product("outer", "outer.default", None, lambda node: output(node).numel)
_product("einsum", "einsum.default", None, einsum_flops, "Einsum")
_product("lstm", "lstm.input", None, recurrent_flops, "LSTM")
_product("gru", "gru.input", None, recurrent_flops, "GRU")
_product("rnn", "rnn_tanh.input rnn_relu.input", None, recurrent_flops, "RNN")
