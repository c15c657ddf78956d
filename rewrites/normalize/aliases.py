"""One op per meaning: torch has several names for some ops (`multiply`, `clip`, `square`, …), which export keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten

SAME = {
    "multiply.Tensor": "mul.Tensor", "multiply.Scalar": "mul.Scalar", "subtract.Tensor": "sub.Tensor", "subtract.Scalar": "sub.Scalar",
    "divide.Tensor": "div.Tensor", "divide.Scalar": "div.Scalar", "true_divide.Tensor": "div.Tensor", "true_divide.Scalar": "div.Scalar",
    "absolute.default": "abs.default", "negative.default": "neg.default", "clip.default": "clamp.default", "clip.Tensor": "clamp.Tensor",
    "greater.Tensor": "gt.Tensor", "greater.Scalar": "gt.Scalar", "greater_equal.Tensor": "ge.Tensor", "greater_equal.Scalar": "ge.Scalar",
    "less.Tensor": "lt.Tensor", "less.Scalar": "lt.Scalar", "less_equal.Tensor": "le.Tensor", "less_equal.Scalar": "le.Scalar",
    "not_equal.Tensor": "ne.Tensor", "not_equal.Scalar": "ne.Scalar", "max.other": "maximum.default", "min.other": "minimum.default",
    "concat.default": "cat.default", "concatenate.default": "cat.default", "special_expit.default": "sigmoid.default",
    "special_erf.default": "erf.default", "special_softmax.default": "softmax.int", "swapaxes.default": "transpose.int",
}  # fmt: skip
RENAMED = {aten(old): aten(new) for old, new in SAME.items()}


def aliases(graph: Graph) -> Graph:
    """The same function with each op under its first name."""
    graph = graph.copy()
    for node in graph.calls:
        node.target = RENAMED.get(node.target, node.target)
        spell = SPELLED.get(node.target)
        if spell is not None:
            made = spell(Builder(graph, node, origin=origin_of(node)), arguments(node))
            if made is not None and tensor_type(made) == tensor_type(node):
                graph.replace(node, made)
    return graph.clean()


def _square(b: Builder, a: dict[str, Any]) -> Node:
    return b.pow(a["self"], 2)


def _relu6(b: Builder, a: dict[str, Any]) -> Node:
    return b.hardtanh(a["self"], 0, 6)


def _addcmul(b: Builder, a: dict[str, Any]) -> Node:
    product = b.mul(a["tensor1"], a["tensor2"])
    return b.add(a["self"], product if a["value"] == 1 else b.mul(product, a["value"]))


def _mean_of_row(b: Builder, a: dict[str, Any]) -> Node | None:
    """Adaptive pooling of a sequence to one place. Of images it stays: runtimes have a kernel for it that keeps the layout of convolutions."""
    return b.call(aten("mean.dim"), (a["self"], [-1], True)) if list(a["output_size"]) == [1] else None


def _glu(b: Builder, a: dict[str, Any]) -> Node | None:
    """One half times the sigmoid of the other: then kernels and axes are those of what it is made of."""
    width = tensor_type(a["self"]).shape[a["dim"]]
    if not isinstance(width, int):
        return None
    halves = b.split(a["self"], width // 2, a["dim"])
    return b.mul(b.item(halves, 0), b.sigmoid(b.item(halves, 1)))


SPELLED: dict[Any, Callable[[Builder, dict[str, Any]], Node | None]] = {
    aten("square.default"): _square,
    aten("relu6.default"): _relu6,
    aten("addcmul.default"): _addcmul,
    aten("adaptive_avg_pool1d.default"): _mean_of_row,
    aten("glu.default"): _glu,
}
