"""What an op that is defined by other ops runs as: those ops, with types, so that its price is theirs.

One kernel's price would be too low: local attention is a lookup of keys, a mask and an attention, each a pass over memory and a launch.
Tracing a definition takes far longer than adding up its price, and each layer of a plan that merges tokens has its own number of them, so large sizes
are rounded, and what was traced is kept.
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

ROUNDED = 64  # sizes from here on stand for the next of sixteen to an octave; a smaller one might not hold what a count takes from it
TRACED = 512  # definitions that are kept: of a search on one model some dozens

_traced: dict[Any, list[tuple[Node, bool]]] = {}


def is_defined(node: Node) -> bool:
    """Whether the op of this call is defined by other ops."""
    op = op_of(node)
    return op is not None and op.definition is not None


def calls_of(node: Node) -> list[tuple[Node, bool]]:
    """The calls that this one stands for, at the example's sizes as `key_of` rounds them, and whether each depends on a tensor that it is given."""
    key = key_of(node)
    if key not in _traced:
        while len(_traced) >= TRACED:
            _traced.pop(next(iter(_traced)))
        _traced[key] = _trace(node)
    return _traced[key]


def _trace(node: Node) -> list[tuple[Node, bool]]:
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
    step = 1 if size < ROUNDED else 2 ** (size.bit_length() - 5)
    return -(-size // step) * step
