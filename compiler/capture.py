"""Capture: from a model to a graph.

A ladder: torch.export (non-strict); else Dynamo's full graph (`dynamo.py`). Both end in one flat graph of composite ATen ops whose weights are
constants, with a signature that binds like the model's own forward. A model that neither can take raises CaptureError with the place where
export stopped; the parts of it that can be captured are found by `islands.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from paretorch.blame import blame, first_line
from paretorch.caches import register_caches
from paretorch.imported import graph_of_export, graph_of_traced, live_tensor
from paretorch.ir.collector import uncollected
from paretorch.ir.errors import CaptureError, InputError
from paretorch.ir.graph import Graph, has_values
from paretorch.ir.protocols import Executable
from paretorch.signature import Signature, leaf_of, parameters_of
from paretorch.weightless import is_weightless, on_host

__all__ = ["Call", "Program", "as_call", "capture", "graph_of_traced"]


@dataclass(frozen=True)
class Call:
    """Positional and keyword inputs together, as example inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Program:
    """A captured model.

    The graph's inputs are the tensors of the user's arguments, then `state`: the buffers that the model changes. mutations: (result, input)
    pairs, by place; a call writes the result back into that input. example: flat inputs, state included. notes: what capture had to do.
    """

    graph: Graph
    example: tuple[Tensor, ...]
    signature: Signature
    original: Callable[..., Any] | None
    state: tuple[Tensor, ...] = ()
    mutations: tuple[tuple[int, int], ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def is_dynamic(self) -> bool:
        return self.signature.is_dynamic

    @cached_property
    def has_weights(self) -> bool:
        """Whether it can be run: not a model that was captured without weights. Found once, since every call asks."""
        return self.graph.has_weights and all(map(has_values, self.example))

    @property
    def symbols(self) -> dict[str, tuple[int, int | None]]:
        """Smallest and largest value of each size that may vary."""
        return dict(self.signature.ranges)

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The graph's inputs, state included. Raises InputError with the argument's name, what was expected and what was found."""
        return (*self.signature.flatten(args, kwargs), *self.state)

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's own output structure from the graph's flat results."""
        return self.signature.unflatten(results)

    def call(self, execute: Executable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run as the model: bind, execute, write changed buffers and inputs back, rebuild the output's structure. Raises InputError."""
        flat = self.flatten(args, kwargs)
        results = execute(*flat)
        if self.mutations:
            with torch.no_grad():
                for result, place in self.mutations:
                    flat[place].copy_(results[result])
        return self.signature.unflatten(results)

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """The model as the user gave it."""
        if self.original is None:
            return self.call(self.graph.module(), args, kwargs)
        return self.original(*args, **kwargs)

    def run_original(self, *flat: Tensor) -> tuple[Any, ...]:
        """The original on flat inputs, with flat results in the order of the graph's outputs. The model's buffers are left as they were."""
        changed = {place for _, place in self.mutations}
        flat = tuple(tensor.clone() if place in changed else tensor for place, tensor in enumerate(flat))
        args, kwargs = self.structure(flat)
        kept = [buffer.clone() for buffer in self.state]
        with torch.no_grad():
            for buffer, value in zip(self.state, flat[len(flat) - len(self.state) :], strict=True):
                buffer.copy_(value)
            leaves = pytree.tree_leaves(self.call_original(*args, **kwargs))
            results: list[Any] = [None] * len(self.graph.outputs)
            for leaf, (kind, place) in zip(leaves, self.signature.outputs, strict=True):
                if kind == "result":
                    results[place] = leaf
            after = (*flat[: len(flat) - len(self.state)], *(buffer.clone() for buffer in self.state))
            for result, place in self.mutations:
                results[result] = after[place]
            for buffer, value in zip(self.state, kept, strict=True):
                buffer.copy_(value)
        return tuple(results)

    def structure(self, flat: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the original from flat inputs; state is ignored."""
        tensors = iter(flat)
        leaves = [next(tensors) if leaf.is_tensor else leaf.value for leaf in self.signature.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.signature.input_spec)
        return tuple(args), dict(kwargs)

    def leaves(self, inputs: Any) -> tuple[Tensor, ...]:
        """Flat inputs of inputs in the form of example_inputs, not yet checked against the captured shapes. Raises InputError."""
        args, kwargs = as_call(inputs)
        found = self.signature.tensors(args, kwargs)
        count = len(self.example) - len(self.state)
        if len(found) != count:
            raise InputError(f"an item of data holds {len(found)} tensors; the captured model takes {count}")
        return (*found, *(buffer.clone() for buffer in self.state))

    def check(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Dtypes and shapes of flat inputs. Raises InputError."""
        count = len(leaves) - len(self.state)
        return (*self.signature.check(leaves[:count]), *leaves[count:])

    def callable_with(self, execute: Executable) -> Callable[..., Any]:
        """A function with the original's signature that runs `execute`; for `evaluate` budgets."""
        if execute == self.run_original:
            return self.call_original

        def model(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self.call(execute, args, kwargs)

        return model

    def signature_json(self) -> str:
        """All that `from_signature` needs beside the graph and the example. Raises ArtifactError."""
        return json.dumps({"signature": self.signature.to_json(), "mutations": self.mutations, "state": len(self.state)})

    @classmethod
    def from_signature(cls, text: str, graph: Graph, example: tuple[Tensor, ...]) -> Program:
        """A program without its original; buffers that it changes start as they were when it was captured. Raises ArtifactError."""
        body = json.loads(text)
        state = tuple(tensor.clone() for tensor in example[len(example) - body["state"] :])
        return cls(graph, example, Signature.from_json(body["signature"]), None, state, tuple((r, p) for r, p in body["mutations"]))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs: a tensor, a tuple of positional, or a mapping (such as a tokenizer's) of keyword inputs. Raises InputError."""
    if isinstance(inputs, Call):
        return inputs.args, dict(inputs.kwargs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise InputError(f"example_inputs is {type(inputs).__name__}; expected a tensor, a tuple of positional or a dict of keyword inputs")


def apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with a copy wherever one tensor is given a second time: tracing would take the two for one input."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    first = {id(leaf): place for place, leaf in reversed(list(enumerate(leaves)))}
    copies = [leaf.clone() if isinstance(leaf, Tensor) and first[id(leaf)] != place else leaf for place, leaf in enumerate(leaves)]
    if all(copy is leaf for copy, leaf in zip(copies, leaves, strict=True)):
        return args, kwargs
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(copies, spec)
    return found


def capture(model: nn.Module | ExportedProgram, example_inputs: Any, dynamic_shapes: Any = None) -> Program:
    """Capture a model for these inputs. dynamic_shapes: torch.export's form, or {"input": {axis: "name"}}.

    A model on the meta device gives a graph whose constants have no values.
    Raises InputError for a wrong call, and CaptureError if the model cannot become one graph, with the place where that failed.
    """
    register_caches()
    args, kwargs = apart(*as_call(example_inputs))
    if isinstance(model, ExportedProgram):
        original = model.module(check_guards=False)
        args, kwargs = _as_exported(model, original, args, kwargs)
        _try_call(original, args, kwargs)
        return from_export(model, original, args, kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; expected a torch.nn.Module or a torch.export.ExportedProgram")
    if model.training:
        raise InputError(
            "the model is in training mode; call model.eval() first, since dropout and batch norm act differently when training"
        )
    if is_weightless(model):
        model, args, kwargs = on_host(model, args, kwargs)
    _try_call(model, args, kwargs)
    dims = named_dims(model, args, kwargs, dynamic_shapes)
    with torch.no_grad():
        return _climb(model, args, kwargs, dims)


def _try_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model once on copies, and put its buffers back. Raises InputError if it does not take these inputs."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    with torch.no_grad():
        try:
            model(*copies[0], **copies[1])
        except Exception as error:  # a model may raise anything
            raise InputError(f"the model does not accept example_inputs: {type(error).__name__}: {first_line(error)}") from error
        finally:
            for buffer, value in before:
                buffer.copy_(value)


def _climb(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Any) -> Program:
    from paretorch.dynamo import from_dynamo

    try:
        naming = _keywords_named(model, kwargs) if isinstance(dims, dict) and _loose(model, kwargs) else nullcontext()
        with uncollected(), naming:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dims, strict=False)
        return from_export(program, model, args, kwargs)
    except Exception as error:  # torch.export raises many kinds; the next rung says what happened
        if dims and "Constraints violated" in str(error):
            raise InputError(f"dynamic_shapes cannot be kept: {_constraints(error)}") from error
        why = f"torch.export: {blame(error)}"
    try:
        found = from_dynamo(model, args, kwargs, dims)
    except Exception as error:
        raise CaptureError(f"the model cannot be captured as one graph. {why}. Dynamo: {blame(error)}") from error
    found.notes.append(f"captured by Dynamo, since {why}")
    return found


def _constraints(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("For more information", "Suggested")))


def named_dims(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    """torch.export's form, where equal names in the short form are one Dim, and inputs that are not named have fixed sizes."""
    named: dict[str, Any] = {}

    def dim(name: Any) -> Any:
        return named.setdefault(name, torch.export.Dim(name, min=1)) if isinstance(name, str) else name

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: dim(value) if isinstance(value, str) else walk(value) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            return type(node)(dim(value) if isinstance(value, str) else walk(value) for value in node)
        return node

    found = walk(dynamic_shapes)
    if not isinstance(found, dict):
        return found
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    loose = _loose(model, kwargs)
    found |= found.pop(loose, {}) if loose else {}
    given = [name for name in bound if name != loose] + list(bound[loose] if loose else ())
    unknown = sorted(set(found) - set(given))
    if unknown:
        raise InputError(f"dynamic_shapes names {', '.join(unknown)}; example_inputs gives {', '.join(given)}")
    return {name: found.get(name) for name in given}


def _loose(model: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """The parameter of forward that takes some of these keywords together (**kwargs); None if it names all of them."""
    parameters = inspect.signature(model.forward).parameters
    catch_all = next((name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD), None)
    return catch_all if set(kwargs) - set(parameters) else None


@contextmanager
def _keywords_named(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """While this lasts, forward's signature names every keyword: torch.export has no shapes for what **kwargs takes."""
    signature, inner = inspect.signature(model.forward), model.forward
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in signature.parameters]
    named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    kept = model.__dict__.get("forward")

    def forward(*args: Any, **options: Any) -> Any:
        return inner(*args, **options)

    forward.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if kept is None:
            del model.forward
        else:
            model.forward = kept


def _as_exported(
    program: ExportedProgram, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, positional and by keyword where the program was exported so. Raises InputError."""
    places, names = (program.call_spec.in_spec.child(0).num_children, list(program.call_spec.in_spec.child(1).context or []))
    parameters = inspect.signature(module.forward)
    try:
        bound = parameters.bind(*args, **kwargs).arguments
        order = list(parameters.parameters)
        return tuple(bound[name] for name in order[:places]), {name: bound[name] for name in names}
    except (TypeError, KeyError) as error:
        raise InputError(f"example_inputs do not fit the exported program, whose inputs are {', '.join(parameters.parameters)}") from error


def from_export(program: ExportedProgram, original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The program of an exported model. Raises CaptureError if its graph holds what ours cannot."""
    with torch.no_grad():
        program = program.run_decompositions({})
    graph, changed = graph_of_export(program)
    specs, found = program.graph_signature.input_specs, program.graph_signature.output_specs
    fakes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = [spec for spec in specs if spec.kind == InputKind.USER_INPUT]
    signature = _signature(original.forward, args, kwargs, program, [fakes.get(spec.arg.name) for spec in leaves])
    state = tuple(live_tensor(original, str(spec.target)) for spec in changed)
    inputs = [node.name for node in graph.inputs]
    by_buffer = {spec.target: spec.arg.name for spec in changed}
    mutations, result = [], 0
    for spec in found:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            mutations.append((result, inputs.index(by_buffer.get(spec.target, spec.target))))
        result += not isinstance(spec.arg, ConstantArgument)
    example = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    copies = tuple(buffer.detach().clone() for buffer in state)
    return Program(graph, (*example, *copies), signature, original, state, tuple(mutations))


def _signature(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], program: ExportedProgram, fakes: list[Any]
) -> Signature:
    outputs: list[tuple[str, Any]] = []
    result = 0
    for spec in program.graph_signature.output_specs:
        is_constant = isinstance(spec.arg, ConstantArgument)
        if spec.kind == OutputKind.USER_OUTPUT:
            outputs.append(("value", spec.arg.value) if is_constant else ("result", result))
        result += not is_constant
    return signature_of(forward, args, kwargs, fakes, program.call_spec.out_spec, outputs, _ranges(program))


def signature_of(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fakes: Sequence[Any],
    output_spec: pytree.TreeSpec,
    outputs: Sequence[tuple[str, Any]],
    ranges: dict[str, tuple[int, int | None]],
) -> Signature:
    """fakes: for each leaf of the arguments its fake tensor, or None."""
    parameters, defaults = parameters_of(forward)
    names = [name for name, _, kind in parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
    positional = tuple(names[i] if i < len(names) else f"input_{i}" for i in range(len(args)))
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    leaves = tuple(leaf_of(_path(path, positional), value, fake) for (path, value), fake in zip(paths, fakes, strict=True))
    plain = {name: value for name, value in defaults.items() if value is None or isinstance(value, (int, float, str, bool))}
    return Signature(parameters, positional, tuple(kwargs), spec, leaves, output_spec, tuple(outputs), plain, ranges)


def _ranges(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    found = {}
    for symbol, bounds in program.range_constraints.items():
        low, high = bounds.lower, bounds.upper
        found[str(symbol)] = (int(low) if low.is_Integer else 0, int(high) if high.is_Integer else None)
    return found


def _path(path: tuple[Any, ...], positional: tuple[str, ...]) -> str:
    """How the user names a leaf: the first two keys are (args or kwargs, place or name)."""
    first, rest = path[1], path[2:]
    name = positional[first.idx] if hasattr(first, "idx") else str(first.key)
    return name + "".join(str(key) for key in rest)
