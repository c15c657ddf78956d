"""From a flat fx graph of composite ATen ops, as torch.export or make_fx leave it, to a graph of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind

from paretorch.ir.errors import CaptureError
from paretorch.ir.graph import Graph, Origin, has_values

Constants = dict[str, tuple[str, Tensor]]  # placeholder or attribute -> (name of the constant, tensor)


def graph_of_export(program: ExportedProgram) -> tuple[Graph, list[InputSpec]]:
    """The graph of a decomposed program, and the specs of the buffers that a run changes: they are its last inputs, in that order.

    Outputs are the program's, without those that are constants.
    """
    found = program.graph_signature
    changed = {str(spec.target) for spec in found.output_specs if spec.kind == OutputKind.BUFFER_MUTATION}
    user = [spec for spec in found.input_specs if spec.kind == InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument)]
    state = [spec for spec in found.input_specs if spec.kind != InputKind.USER_INPUT and spec.target in changed]
    constants: Constants = {}
    for spec in found.input_specs:
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target)) if spec.target else None
        if spec.kind != InputKind.USER_INPUT and spec not in state and isinstance(tensor, Tensor):
            constants[spec.arg.name] = (str(spec.target), tensor.detach())
    kept = [not isinstance(spec.arg, ConstantArgument) for spec in found.output_specs]
    graph = from_fx(program.graph, constants, [spec.arg.name for spec in [*user, *state]])
    graph.set_outputs([value for value, keep in zip(graph.outputs, kept, strict=True) if keep])
    return graph.clean(), state


def graph_of_traced(traced: fx.GraphModule, inputs: Sequence[Any], mode: Any = None) -> Graph:
    """The graph of what make_fx traced; every placeholder is an input. inputs: fake, one per placeholder. Raises CaptureError."""
    names = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    constants = {name: (name.replace(".", "_"), live_tensor(traced, name)) for name in names}
    others = [name for name, (_, value) in constants.items() if not isinstance(value, Tensor)]
    if others:
        raise CaptureError(f"the graph holds {', '.join(others)}, which are graphs of their own (control flow); these are not rewritten")
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, value in zip(places, inputs, strict=True):
        node.meta["val"] = value
    return from_fx(traced.graph, constants, [node.name for node in places], mode)


def live_tensor(module: nn.Module, name: str) -> Any:
    """The module's own tensor of that name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def from_fx(source: fx.Graph, constants: Constants, inputs: Sequence[str], mode: Any = None) -> Graph:
    """A graph from a flat fx graph with types in meta["val"]. inputs: names of placeholders, in the order that the graph is to have.

    Raises CaptureError for ops that hold graphs of their own.
    """
    fakes = {node.name: node.meta.get("val") for node in source.nodes if node.op == "placeholder"}
    graph = Graph("model", mode or next((n.meta["val"].fake_mode for n in source.nodes if hasattr(n.meta.get("val"), "fake_mode")), None))
    made = {name: graph.input(name, fakes[name]) for name in inputs}
    copies: dict[fx.Node, Any] = {}
    shared: dict[Any, fx.Node] = {}
    for node in source.nodes:
        if node.op == "placeholder" and node.name in made:
            copies[node] = made[node.name]
        elif node.op in ("placeholder", "get_attr"):
            key = node.name if node.op == "placeholder" else str(node.target)
            copies[node] = _constant(graph, shared, *constants[key]) if key in constants else None
        elif node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            graph.set_outputs(fx.node.map_arg(tuple(values), lambda n: copies[n]))
        else:
            copies[node] = _copy(graph, node, copies)
    return graph.clean()


def _copy(graph: Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureError(f"the graph holds control flow ({node.target}) at {origin_of_meta(node.meta)}; this is not rewritten")
    copy = graph.fx.node_copy(node, lambda n: copies[n])
    copy.meta = {"val": node.meta.get("val"), "origin": origin_of_meta(node.meta)}
    return copy


def _constant(graph: Graph, shared: dict[Any, fx.Node], name: str, tensor: Tensor) -> fx.Node:
    """Tied weights are one constant."""
    place = tensor.data_ptr() if has_values(tensor) and tensor.numel() else id(tensor)
    key = (place, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    if key not in shared:
        shared[key] = graph.add_constant(name, tensor)
    return shared[key]


FRAME = re.compile(r'File "([^"]+)", line (\d+)')
TORCH = os.path.dirname(torch.__file__) + os.sep


def origin_of_meta(meta: dict[str, Any]) -> Origin:
    """Module path, and the line of the user's code: the innermost frame that is not torch's."""
    stack = meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry and entry[0]), "")
    frames = FRAME.findall(meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(TORCH)] or frames
    source = f"{os.path.basename(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    return Origin(path.removeprefix("L['self']."), source)
