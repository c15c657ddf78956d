"""Graphs for tests: models exported as they stand, captured and normalized ones, and a transformer of our own ops; what a graph is made of."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from paretorch.capture import Program, capture
from paretorch.contest import relative_error
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, Origin
from paretorch.ir.ops import aten, op_of
from paretorch.ir.types import TensorType
from paretorch.rewrites.normalize import normalize
from tests.zoo import make

SIZES: dict[str, dict[str, int]] = {
    "plain": {},
    "T=C": {"T": 16, "C": 16, "H": 4, "B": 2},
    "T=B": {"T": 8, "C": 24, "H": 4, "B": 8},
    "T=H": {"T": 8, "C": 16, "H": 8, "B": 2},
}


@cache
def zoo_graph(name: str, sizes: str = "plain") -> Graph:
    """The graph of one model of the zoo, made once; not to be edited."""
    return exported(*make(name, **SIZES[sizes]))


def exported(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None) -> Graph:
    """The model's graph as torch.export gives it."""
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=False).run_decompositions({})
    fake_mode = next(node.meta["val"].fake_mode for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    graph, copies = Graph("model", fake_mode), {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {**program.state_dict, **program.constants}
    for node in program.graph.nodes:
        if node.op == "output":
            kept = [spec.kind is OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs]
            graph.set_outputs([copies.get(value, value) for value, keep in zip(node.args[0], kept, strict=True) if keep])
            continue
        if "val" not in node.meta:  # a check that export adds
            continue
        spec = specs.get(node.name)
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            copies[node] = graph.fx.create_node("get_attr", node.name, name=node.name)
            graph.constants[node.name] = tensors[spec.target].detach()
        else:
            copies[node] = graph.fx.node_copy(node, lambda n: copies[n])
        stack = list(node.meta.get("nn_module_stack", {}).values())
        copies[node].meta = {"val": node.meta["val"], "origin": Origin(stack[-1][0] if stack else "")}
    return graph


@cache
def zoo_program(name: str) -> Program:
    """One model of the zoo in f64, captured once."""
    model, inputs = make(name)
    return capture(model.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs))


@cache
def zoo_normal(name: str) -> Graph:
    """The normalized graph of one model of the zoo in f64, made once; not to be edited."""
    return normalize(zoo_program(name).graph)


def names(graph: Graph) -> list[str]:
    """The ops of a graph, in order."""
    return [op_of(node).name if op_of(node) else str(node.target) for node in graph.calls]


def errors(graph: Graph, expected: Any, inputs: Any) -> float:
    """The largest relative error of what the graph gives for these inputs."""
    found = graph.run(*inputs)
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, torch.Tensor)]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return max(relative_error(a.double(), b.double()) for a, b in pairs)


class Each(nn.Module):
    """Every function on an input of its own, so that nothing is shared between them."""

    def __init__(self, functions: Any, *weights: Tensor) -> None:
        super().__init__()
        self.functions = functions
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(f(x, *self.weights) for f, x in zip(self.functions, inputs, strict=True))


def block(b: Builder, x: Node, place: int, width: int, heads: int) -> Node:
    """A pre-norm transformer block on [B, T, C]; weights are its own."""

    def linear(y: Node, name: str, inner: int, outer: int) -> Node:
        return b.linear(y, b.constant(f"{name}{place}", torch.zeros(outer, inner)), b.constant(f"{name}_bias{place}", torch.zeros(outer)))

    def norm(y: Node) -> Node:
        return b.layer_norm(y, [width])

    split = [-1, x.meta["val"].shape[1], 3, heads, width // heads]
    qkv = b.unbind(b.permute(b.view(linear(norm(x), "qkv", width, 3 * width), split), [2, 0, 3, 1, 4]), 0)
    mixed = b.attention(b.item(qkv, 0), b.item(qkv, 1), b.item(qkv, 2), scale=1.0)
    joined = b.call(aten("reshape.default"), (b.permute(mixed, [0, 2, 1, 3]), [-1, x.meta["val"].shape[1], width]))
    x = b.add(x, linear(joined, "out", width, width))
    return b.add(x, linear(b.gelu(linear(norm(x), "up", width, 4 * width)), "down", 4 * width, width))


def transformer(depth: int, batch: int = 2, tokens: int = 16, width: int = 32, heads: int = 4, dtype: str = "f32") -> Graph:
    """Pre-norm blocks with weights of zeros, then the mean over tokens and a head of ten classes."""

    def body(b: Builder, x: Node) -> Node:
        for place in range(depth):
            x = block(b, x, place, width, heads)
        return b.linear(b.mean(x, [1]), b.constant("head", torch.zeros(10, width)))

    return build("transformer", body, x=TensorType(dtype, (batch, tokens, width)))
