"""Rows of matrix products and of recurrent layers. What a bias adds is not counted, as in torch's own counter."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, output, tensors, value_type
from paretorch.ir.ops.table import Missing, Op, OpTemplate, aten, define


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
    """Two per combination of the indices of two operands, one if none of them is contracted; several operands in the order of `path`.

    What is summed before, an index that only one of the two has and nothing later needs, is not counted, as in torch's own counter.
    """
    given = arguments(node)
    terms, result, sizes = _einsum_indices(node)
    path, flops = list(given["path"] or [0, 1] + [0, -1] * (len(terms) - 2)), 0  # what two operands give stands last
    while len(terms) > 1:
        one, other = (terms[place] for place in (path.pop(0), path.pop(0)))
        terms = [term for term in terms if term is not one and term is not other]
        needed = result.union(*terms)
        met = {label for label in one | other if label in needed or (label in one and label in other)}
        terms.append(met & needed)
        flops = flops + (1 if met <= needed else 2) * prod(sizes[label] for label in sorted(met))
    return flops


def _einsum_indices(node: Node) -> tuple[list[set[str]], set[str], dict[str, Any]]:
    """The indices of each operand, those of the result, and the length of each; axes of length one have none."""
    given = arguments(node)
    inputs, arrow, outputs = given["equation"].partition("->")
    shapes = [value_type(operand).shape for operand in given["tensors"]]  # type: ignore[union-attr]
    labelled = [_labels(term, len(shape)) for term, shape in zip(inputs.split(","), shapes, strict=True)]
    every = [label for labels in labelled for label in labels]
    if arrow:
        result = {label for label in every if ("..." if label.startswith("...") else label) in outputs}
    else:
        result = {label for label in every if label.startswith("...") or every.count(label) == 1}
    pairs = [list(zip(labels, shape, strict=True)) for labels, shape in zip(labelled, shapes, strict=True)]
    sizes = {label: size for term in pairs for label, size in term if size != 1}
    return [{label for label, size in term if size != 1} for term in pairs], result, sizes


def recurrent_flops(node: Node) -> Any:
    """Each step of each sample meets every weight matrix once: 2 * B * T * (elements of all matrices)."""
    given = arguments(node)
    weights = [value_type(parameter) for parameter in given["params"]]
    return 2 * prod(_operand(node, 0).shape[:-1]) * sum(weight.numel for weight in weights if weight.rank == 2)  # type: ignore[union-attr]


def _product(
    name: str,
    overloads: str,
    axes: str | None,
    flops: Any = product_flops,
    onnx: str | Missing = "MatMul",
    *,
    roles: dict[str, str] | None = None,
) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="matrix",
        flops=flops, bytes=inputs_and_output, axes=axes, onnx=onnx,
        triton=OpTemplate("product", tuple(roles.items())) if roles is not None else Missing("the vendor's product"),
    ))  # fmt: skip


_product("linear", "linear.default", "linear", roles={"x": "input", "weight": "weight", "bias": "bias"})
_product("matmul", "matmul.default", "matmul", roles={"x": "self", "turned_weight": "other"})
_product("mm", "mm.default", "matmul", roles={"x": "self", "turned_weight": "mat2"})
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
