"""Fuse a linear with its bias and the activation that alone reads it.

activation(linear(x, W, b))  ->  linear_activation(x, W, b, activation)

Exact. The linear's output never travels to memory between: two passes over the hidden activation and one launch less.
A fusion of our own kernels: torch and ONNX runtimes see through the op and are no faster for it. Source: Dao-AILab's fused dense layers, 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from paretorch.ir.analyze import Facts
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.fused import ACTIVATIONS
from paretorch.ir.types import TensorType
from paretorch.rewrites.block_fusion.weights import only_user
from paretorch.rewrites.rule import Exact, Knob, Refusal, Rule, Site

NAME = "fuse_bias_activation"


def sites(graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    for node in graph.calls:
        if _activation(node) is not None and is_op(node.args[0], "linear"):
            linear: Node = node.args[0]  # type: ignore[assignment]
            if only_user(linear) is None:
                others = ", ".join(user.name for user in linear.users if user is not node)
                yield Refusal(NAME, node.name, f"{linear.name} is also used by {others}, so it would be computed twice")
            else:
                yield Site(node.name, origin_of(node).path)


def _activation(node: Node) -> str | None:
    """The name that the fused op has for this activation."""
    op, given = op_of(node), arguments(node)
    if op is None or not op.elementwise:
        return None
    defaults = {parameter.name: parameter.default_value for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    odd = {name: value for name, value in given.items() if not isinstance(value, Node) and value != defaults[name]}
    return next((name for name, (row, attributes) in ACTIVATIONS.items() if row == op.name and attributes == odd), None)


def rewrite(graph: Graph, site: Site, knob: Knob) -> Graph:
    graph = graph.edit()
    node = graph.node(site.name)
    assert node is not None and isinstance(node.args[0], Node)  # sites said so  # noqa: PT018
    b = Builder(graph, node, origin=origin_of(node), rule=NAME, site=site.name)
    graph.replace(node, b.linear_activation(*arguments(node.args[0]).values(), activation=_activation(node)))
    return graph.clean()


def example(batch: int = 2, width: int = 8) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def body(b: Builder, x: Node) -> Node:
        weight, bias = b.constant("weight", torch.randn(6, width, generator=chance)), b.constant("bias", torch.randn(6, generator=chance))
        return b.gelu(b.linear(x, weight, bias), approximate="tanh")

    return build("feed_forward", body, x=TensorType("f32", (batch, 3, width)))


RULE = Rule(
    name=NAME, family="block_fusion", effect=Exact(), saves=("bytes", "launches"), source="github.com/Dao-AILab/flash-attention, csrc/fused_dense_lib",
    example=example, sites=sites, rewrite=rewrite,
)  # fmt: skip
