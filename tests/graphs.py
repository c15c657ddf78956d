"""Graphs for tests of the analyses: a model exported as it stands, without capture's and normalize's help."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind

from paretorch.ir.graph import Graph, Origin
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
