"""What an op that is defined by other ops runs as: those ops, with types, so that its price is theirs.

One kernel's price would be too low: local attention is a lookup of keys, a mask and an attention, each a pass over memory and a launch.
Tracing a definition takes 50 to 100 ms, and each layer of a plan that merges tokens has its own number of them, so large sizes are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from paretorch.cost_model.work import number, sizes
from paretorch.ir.ops import op_of

ROUNDED, STEP = 64, 8  # sizes from the first on stand for the nearest multiple of the second


def is_defined(node: Node) -> bool:
    """Whether the op of this call is defined by other ops."""
    op = op_of(node)
    return op is not None and op.definition is not None


def calls_of(node: Node) -> list[tuple[Node, bool]]:
    """The calls that this one stands for, at the example's sizes as `key_of` rounds them, and whether each depends on a tensor that it is given."""
    op, operands = op_of(node), node.all_input_nodes
    assert op is not None and op.definition is not None  # asked by is_defined  # noqa: PT018
    definition = op.definition
    with FakeTensorMode():
        values = [torch.empty(made[0], dtype=made[1]) if isinstance(made, tuple) else made for made in _operands(node)]

    def function(*given: Tensor) -> Any:
        by_node = dict(zip(operands, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda operand: by_node[operand])
        return definition(*args, **kwargs)

    with torch.no_grad():
        traced = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*values)
    varies: dict[Node, bool] = {}
    for call in traced.graph.nodes:
        varies[call] = call.op == "placeholder" or any(varies[argument] for argument in call.all_input_nodes)
    return [(call, varies[call]) for call in traced.graph.nodes if call.op == "call_function" and call.meta.get("val") is not None]


def key_of(node: Node) -> Any:
    """Equal for calls that stand for the same calls."""
    places = {operand: place for place, operand in enumerate(node.all_input_nodes)}
    written = fx.node.map_arg((node.args, dict(node.kwargs)), lambda operand: f"operand {places[operand]}")
    return str(node.target), repr(written), tuple(map(str, _operands(node)))


def _operands(node: Node) -> list[Any]:
    """(sizes, dtype) of each tensor that a call is given, or a number."""
    found: list[Any] = []
    for operand in node.all_input_nodes:
        value = operand.meta["val"]
        if isinstance(value, Tensor):
            found.append((tuple(map(_rounded, sizes(node, value))), value.dtype))
        else:
            found.append(_rounded(int(number(value, node))))
    return found


def _rounded(size: int) -> int:
    return size if size < ROUNDED else STEP * round(size / STEP)
