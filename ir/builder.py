"""Builder: writes nodes by the names of the op table.

    b = Builder(graph, before=node)
    y = b.add(b.linear(x, weight, bias), residual)

Each call emits the first overload of that row, gives the new node its type, and stamps it with the origin, rule and site of the builder.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import Graph, Origin, new_fake_mode
from paretorch.ir.ops import row
from paretorch.ir.types import DTYPES, TensorType


class Builder:
    """graph: edited in place; before: where new nodes go (at the end if None)."""

    def __init__(self, graph: Graph, before: Node | None = None, *, origin: Origin | None = None, rule: str = "", site: str = "") -> None:
        self.graph, self.before = graph, before
        self.origin, self.rule, self.site = origin, rule, site

    def __getattr__(self, name: str) -> Callable[..., Node]:
        if name.startswith("_"):
            raise AttributeError(name)
        target = row(name).targets[0]
        return lambda *args, **kwargs: self.call(target, args, kwargs)

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Node:
        """Emit any overload, also one without a row."""
        return self._stamp(self.graph.call(target, args, kwargs, before=self.before))

    def constant(self, name: str, tensor: Tensor) -> Node:
        return self._stamp(self.graph.add_constant(name, tensor, self.before))

    def item(self, value: Node, index: int) -> Node:
        """One output of an op with several."""
        return self.call(operator.getitem, (value, index))

    def _stamp(self, node: Node) -> Node:
        node.meta["origin"] = self.origin or Origin()
        if self.rule:
            node.meta["rule"], node.meta["site"] = self.rule, self.site
        return node


def build(name: str, function: Callable[..., Any], /, **inputs: TensorType) -> Graph:
    """A graph from a function of a builder and one value per named input; it returns a value or a tuple of values."""
    graph = Graph(name, new_fake_mode())
    values = {key: graph.input(key, fake_of(graph, type_)) for key, type_ in inputs.items()}
    builder = Builder(graph)
    result = function(builder, **values)
    graph.set_outputs(result if isinstance(result, (tuple, list)) else (result,))
    return graph


def fake_of(graph: Graph, type_: TensorType) -> Any:
    """A fake tensor of that type; every symbol of its shape becomes (or already is) a symbol of the graph's shape environment."""
    sizes = [size if isinstance(size, int) else symbol_of(graph, str(size)) for size in type_.shape]
    with graph.fake_mode:
        return torch.empty(sizes, dtype=DTYPES[type_.dtype])


def symbol_of(graph: Graph, name: str, hint: int = 8) -> Any:
    """The symbolic size of that name in the graph's shape environment."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    known: dict[str, Any] = graph.fake_mode.__dict__.setdefault("_paretorch_symbols", {})
    if name not in known:
        environment, source = graph.fake_mode.shape_env, ConstantSource(name)
        assert environment is not None  # new_fake_mode makes one
        symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        known[name] = environment.create_symintnode(symbol, hint=hint, source=source)
    return known[name]
