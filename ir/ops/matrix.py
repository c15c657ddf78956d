"""Rows of matrix products."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from paretorch.ir.ops.costs import inputs_and_output, operands, output
from paretorch.ir.ops.table import Op, aten, define


def product_flops(node: Node) -> Any:
    """2 * m * k * n for every product: two per element of the output and of the contracted axis, plus the bias."""
    left = operands(node)[0] if node.args[0] in node.all_input_nodes else output(node)
    return 2 * output(node).numel * left.shape[-1]


def biased_product_flops(node: Node) -> Any:
    """bias + left @ right, where the bias is the first operand."""
    left: Node = node.args[1]  # type: ignore[assignment]
    return 2 * output(node).numel * left.meta["val"].shape[-1]


def _product(name: str, overloads: str, axes: str, flops: Any = product_flops) -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="matrix",
        flops=flops, bytes=inputs_and_output, axes=axes, onnx="MatMul",
    ))  # fmt: skip


_product("linear", "linear.default", "linear")
_product("matmul", "matmul.default", "matmul")
_product("mm", "mm.default", "matmul")
_product("bmm", "bmm.default", "matmul")
_product("addmm", "addmm.default", "addmm", biased_product_flops)
_product("baddbmm", "baddbmm.default", "addmm", biased_product_flops)
