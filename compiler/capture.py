"""Capture: from a model to a graph.

A ladder: torch.export (non-strict); else Dynamo's full graph; else the exportable submodules with eager glue (`islands.py`). All end in one flat
graph of composite ATen ops whose weights are constants, with a signature that binds like the model's own forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from paretorch.ir.errors import CaptureError, InputError
from paretorch.ir.graph import Graph, Origin
from paretorch.ir.protocols import Executable
from paretorch.signature import Signature, leaf_of, parameters_of


@dataclass
class Program:
    """A captured model. example: flat inputs; mutations: (result index, buffer) that a call writes back; notes: what capture had to do."""

    graph: Graph
    example: tuple[Tensor, ...]
    signature: Signature
    original: Callable[..., Any] | None
    mutations: tuple[tuple[int, Tensor], ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def is_dynamic(self) -> bool:
        return self.signature.is_dynamic

    def call(self, execute: Executable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run as the model: bind, execute, write mutated buffers back, rebuild the output's structure. Raises InputError."""
        results = execute(*self.signature.flatten(args, kwargs))
        for index, buffer in self.mutations:
            buffer.copy_(results[index])
        return self.signature.unflatten(results)

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """The model as the user gave it."""
        if self.original is None:
            return self.call(self.graph.module(), args, kwargs)
        return self.original(*args, **kwargs)

    def run_original(self, *flat: Tensor) -> tuple[Any, ...]:
        """The original on flat inputs, with flat results in the order of the graph's outputs (mutated buffers are not among them)."""
        args, kwargs = self.structure(flat)
        with torch.no_grad():
            leaves = pytree.tree_leaves(self.call_original(*args, **kwargs))
        return tuple(leaf for leaf, (kind, _) in zip(leaves, self.signature.outputs, strict=True) if kind == "result")

    def structure(self, flat: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the original from flat inputs."""
        tensors = iter(flat)
        leaves = [next(tensors) if leaf.is_tensor else leaf.value for leaf in self.signature.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.signature.input_spec)
        return tuple(args), dict(kwargs)

    def leaves(self, inputs: Any) -> tuple[Tensor, ...]:
        """Flat tensors of inputs in the form of example_inputs, not yet checked against the captured shapes. Raises InputError."""
        args, kwargs = as_call(inputs)
        found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(found) != len(self.example):
            raise InputError(f"an item of data holds {len(found)} tensors; the captured model takes {len(self.example)}")
        return tuple(found)

    def check(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.signature.check(leaves)

    def unflatten(self, results: Sequence[Any]) -> Any:
        return self.signature.unflatten(results)

    def callable_with(self, execute: Executable) -> Callable[..., Any]:
        """A function with the original's signature that runs `execute`; for `evaluate` budgets."""
        if execute == self.run_original:
            return self.call_original

        def model(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self.call(execute, args, kwargs)

        return model


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs: a tensor, a tuple of positional, or a dict of keyword inputs. Raises InputError."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise InputError(f"example_inputs is {type(inputs).__name__}; expected a tensor, a tuple of positional or a dict of keyword inputs")


def capture(model: nn.Module | ExportedProgram, example_inputs: Any, dynamic_shapes: Any = None) -> Program:
    """Capture a model for these inputs. dynamic_shapes: torch.export's form, or {"input": {axis: "name"}}.

    Raises InputError for a wrong call and CaptureError if no part of the model can be captured.
    """
    args, kwargs = as_call(example_inputs)
    if isinstance(model, ExportedProgram):
        return _from_export(model, model.module(check_guards=False), args, kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; expected a torch.nn.Module or a torch.export.ExportedProgram")
    if model.training:
        raise InputError(
            "the model is in training mode; call model.eval() first, since dropout and batch norm act differently when training"
        )
    with torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise InputError(f"the model does not accept example_inputs: {type(error).__name__}: {_first_line(error)}") from error
        return _climb(model, args, kwargs, _dims(dynamic_shapes))


def _climb(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Any) -> Program:
    from paretorch.dynamo import from_dynamo
    from paretorch.islands import from_islands

    register_caches()
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dims, strict=False)
        return _from_export(program, model, args, kwargs)
    except Exception as error:  # torch.export raises many kinds; the next rung says what happened
        why = f"torch.export: {type(error).__name__}: {_first_line(error)}"
    try:
        found = from_dynamo(model, args, kwargs, dims)
        found.notes.append(f"captured by Dynamo, since {why}")
        return found
    except Exception as error:
        why += f"; Dynamo: {type(error).__name__}: {_first_line(error)}"
    return from_islands(model, args, kwargs, why)


def _dims(dynamic_shapes: Any) -> Any:
    """torch.export's form, where equal names in the short form are one Dim."""
    named: dict[str, Any] = {}

    def dim(name: Any) -> Any:
        return named.setdefault(name, torch.export.Dim(name, min=1)) if isinstance(name, str) else name

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: dim(value) if isinstance(value, str) else walk(value) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            return type(node)(dim(value) if isinstance(value, str) else walk(value) for value in node)
        return node

    return walk(dynamic_shapes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _from_export(program: ExportedProgram, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    program = program.run_decompositions({})
    found, specs = program.graph_signature, program.graph_signature.input_specs
    fakes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    forward = original.forward if isinstance(original, nn.Module) else original
    user = [spec for spec in specs if spec.kind == InputKind.USER_INPUT]
    signature = _signature(forward, args, kwargs, program, [fakes.get(spec.arg.name) for spec in user])
    constants = _constants(program)
    graph = from_fx(program.graph, constants, [spec.arg.name for spec in user if not isinstance(spec.arg, ConstantArgument)])
    mutated = [
        (index, constants_target(original, str(spec.target)))
        for index, spec in enumerate(found.output_specs)
        if spec.kind == OutputKind.BUFFER_MUTATION
    ]
    example = signature.flatten(args, kwargs)
    notes = _refuse_input_mutation(found)
    return Program(graph, example, signature, original, tuple(mutated), notes)


def _refuse_input_mutation(found: Any) -> list[str]:
    changed = [spec.target for spec in found.output_specs if spec.kind == OutputKind.USER_INPUT_MUTATION]
    if changed:
        raise CaptureError(f"the model writes into its inputs {', '.join(map(str, changed))}; return the new values instead")
    return []


def constants_target(original: Any, name: str) -> Tensor:
    """The live tensor of that name, which a call writes back into."""
    target: Any = original
    for part in name.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]


def _constants(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Placeholder name -> (name of the constant, tensor)."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(tensor, Tensor):
            found[spec.arg.name] = (spec.target, tensor.detach())
    return found


def _signature(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], program: ExportedProgram, fakes: list[Any]
) -> Signature:
    parameters, defaults = parameters_of(forward)
    names = [name for name, _, kind in parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
    positional = tuple(names[i] if i < len(names) else f"input_{i}" for i in range(len(args)))
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    leaves = tuple(
        leaf_of(_path(path, positional), value, fake) for (path, value), fake in zip(paths, [*fakes, *[None] * len(paths)], strict=False)
    )
    outputs = []
    for index, out in enumerate(program.graph_signature.output_specs):
        if out.kind == OutputKind.USER_OUTPUT:
            outputs.append(("value", out.arg.value) if isinstance(out.arg, ConstantArgument) else ("result", index))
    plain = {name: value for name, value in defaults.items() if value is None or isinstance(value, (int, float, str, bool))}
    return Signature(parameters, positional, tuple(kwargs), spec, leaves, program.call_spec.out_spec, tuple(outputs), plain)


def _path(path: tuple[Any, ...], positional: tuple[str, ...]) -> str:
    """How the user names a leaf: the first two keys are (args or kwargs, place or name)."""
    first, rest = path[1], path[2:]
    name = positional[first.idx] if hasattr(first, "idx") else str(first.key)
    return name + "".join(str(key) for key in rest)


def from_fx(source: fx.Graph, constants: dict[str, tuple[str, Tensor]], inputs: Sequence[str]) -> Graph:
    """A graph from a flat fx graph of ATen ops with types in meta["val"]. constants: placeholder or attribute -> (name, tensor)."""
    mode = next((n.meta["val"].fake_mode for n in source.nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    graph = Graph("model", mode)
    copies: dict[fx.Node, Any] = {}
    shared: dict[int, fx.Node] = {}
    for node in source.nodes:
        if node.op == "placeholder" and node.name in inputs:
            copies[node] = graph.input(node.name, node.meta["val"])
        elif node.op in ("placeholder", "get_attr"):
            key = node.name if node.op == "placeholder" else str(node.target)
            copies[node] = _constant(graph, shared, *constants[key]) if key in constants else None
        elif node.op == "output":
            graph.set_outputs(fx.node.map_arg(tuple(node.args[0]), lambda n: copies[n]))
        else:
            copy = graph.fx.node_copy(node, lambda n: copies[n])
            copy.meta = {"val": node.meta.get("val"), "origin": origin_of_meta(node.meta)}
            copies[node] = copy
    return graph.clean()


def _constant(graph: Graph, shared: dict[int, fx.Node], name: str, tensor: Tensor) -> fx.Node:
    """Tied weights are one constant."""
    if id(tensor) not in shared and tensor.data_ptr():
        twin = next((n for n in shared.values() if _same_storage(graph.constants[str(n.target)], tensor)), None)
        shared[id(tensor)] = twin if twin is not None else graph.add_constant(name, tensor)
    elif id(tensor) not in shared:
        shared[id(tensor)] = graph.add_constant(name, tensor)
    return shared[id(tensor)]


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def graph_of_traced(module: fx.GraphModule, fakes: Sequence[Any], mode: Any) -> Graph:
    """A graph of a traced module whose weights are inputs, as torch.compile gives it; types are computed from the fake inputs."""
    graph = Graph("compiled", mode)
    copies: dict[fx.Node, Any] = {}
    given = iter(fakes)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.input(node.name, next(given))
        elif node.op == "get_attr":
            held = constants_target(module, str(node.target))
            if not isinstance(held, Tensor):
                raise CaptureError(f"{node.target} is {type(held).__name__}: control flow inside of the graph stays with inductor")
            copies[node] = graph.add_constant(str(node.target).replace(".", "_"), held)
        elif node.op == "output":
            graph.set_outputs(fx.node.map_arg(tuple(node.args[0]), lambda n: copies[n]))
        else:
            copy = graph.fx.node_copy(node, lambda n: copies[n])
            copy.meta = {"val": node.meta.get("val"), "origin": origin_of_meta(node.meta)}
            copies[node] = copy
    return graph.clean()


FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def origin_of_meta(meta: dict[str, Any]) -> Origin:
    """Module path and source line from what export recorded."""
    stack = meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry and entry[0]), "")
    frames = FRAME.findall(meta.get("stack_trace") or "")
    source = f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
    return Origin(path.removeprefix("L['self']."), source)


def register_caches() -> None:
    """Let transformers' caches be inputs and outputs, if transformers is loaded; a second registration changes nothing."""
    import sys

    if "transformers" not in sys.modules:
        return
    from torch.utils._pytree import SUPPORTED_NODES
    from transformers import DynamicCache

    if DynamicCache in SUPPORTED_NODES:
        return

    def flatten(cache: Any) -> tuple[list[Any], Any]:
        return [[layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]], None

    def unflatten(parts: Any, _: Any) -> Any:
        cache = DynamicCache()
        for index, (keys, values) in enumerate(zip(*parts, strict=True)):
            cache.update(keys, values, index)
        return cache

    pytree.register_pytree_node(DynamicCache, flatten, unflatten, serialized_type_name="transformers.DynamicCache")
