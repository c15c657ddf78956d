"""The second rung of capture: Dynamo's full graph, recorded by a backend of our own, then exported as a plain module.

Dynamo lifts weights to inputs of its graph. The recorded call is made with the real tensors, so weights, inputs and outputs are told apart by identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paretorch.ir.errors import CaptureError

if TYPE_CHECKING:
    from paretorch.capture import Program
    from paretorch.ir.graph import Graph


class Recorder:
    """A backend that keeps each graph, and what the first call of it was given and returned."""

    def __init__(self) -> None:
        self.calls: list[tuple[fx.GraphModule, tuple[Any, ...], tuple[Any, ...]]] = []

    def __call__(self, module: fx.GraphModule, _: Sequence[Any]) -> Any:
        def run(*given: Any) -> Any:
            results = module(*given)
            self.calls.append((module, given, tuple(results)))
            return results

        return run


class Recorded(nn.Module):
    """Dynamo's graph with its weights as buffers: takes the tensors that vary."""

    def __init__(self, module: fx.GraphModule, given: Sequence[Any], varying: set[int]) -> None:
        super().__init__()
        self.module = module
        self.kept = tuple(None if place in varying or isinstance(value, Tensor) else value for place, value in enumerate(given))
        self.places = {place for place, value in enumerate(given) if isinstance(value, Tensor) and place not in varying}
        self.varying = varying
        for place in self.places:
            self.register_buffer(f"weight_{place}", given[place].detach())

    def forward(self, *tensors: Tensor) -> Any:
        varying, inputs = iter(tensors), []
        for place, value in enumerate(self.kept):
            held = getattr(self, f"weight_{place}") if place in self.places else value
            inputs.append(next(varying) if place in self.varying else held)
        return self.module(*inputs)


def from_dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Any) -> Program:
    """Raises whatever Dynamo or export raise, and CaptureError where the result cannot be matched with the model's."""
    from paretorch.capture import Program, from_export, signature_of

    if dims:
        raise CaptureError("Dynamo's graph is used with fixed sizes only, and dynamic_shapes was given")
    copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    output, (module, given, results) = _record(model, *copies)
    places = {id(leaf): place for place, leaf in enumerate(t for t in pytree.tree_leaves(copies) if isinstance(t, Tensor))}
    varying = [place for place, value in enumerate(given) if id(value) in places]
    recorded = Recorded(module, given, set(varying)).eval()
    flat = tuple(given[place] for place in varying)
    inner = from_export(torch.export.export(recorded, flat, strict=False), recorded, flat, {})
    if inner.mutations:
        raise CaptureError("the model changes its buffers or inputs, which Dynamo's graph does not say by name")
    leaves, spec = pytree.tree_flatten(output)
    places_of_results = [place for kind, place in inner.signature.outputs if kind == "result"]
    if len(places_of_results) != len(results):
        raise CaptureError("Dynamo's graph returns values that are no tensors")
    example = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    graph = _with_all_inputs(_renamed(inner.graph, given, model), [places[id(tensor)] for tensor in flat], example)
    known = {id(result): place for result, place in zip(results, places_of_results, strict=True)}
    values = graph.outputs
    for leaf in leaves:
        if id(leaf) in places and id(leaf) not in known:  # an input that is returned as it is
            known[id(leaf)] = len(values)
            values.append(graph.inputs[places[id(leaf)]])
    graph.set_outputs(values)
    outputs = [_place(leaf, known) for leaf in leaves]
    fakes = iter(node.meta["val"] for node in graph.inputs)
    given_leaves = pytree.tree_leaves((args, kwargs))
    signature = signature_of(
        model.forward, args, kwargs, [next(fakes) if isinstance(x, Tensor) else None for x in given_leaves], spec, outputs, {}
    )
    return Program(graph, example, signature, model)


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[fx.GraphModule, tuple[Any, ...], tuple[Any, ...]]]:
    recorder = Recorder()
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            output = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if len(recorder.calls) != 1:
        raise CaptureError(f"Dynamo made {len(recorder.calls)} graphs; one is needed")
    return output, recorder.calls[0]


def _place(leaf: Any, known: dict[int, int]) -> tuple[str, Any]:
    """Which result of the graph an output is; an output that is no tensor keeps the value that it had."""
    if not isinstance(leaf, Tensor):
        return "value", leaf
    if id(leaf) not in known:
        raise CaptureError("an output of the model is not among the results of Dynamo's graph")
    return "result", known[id(leaf)]


def _renamed(graph: Graph, given: Sequence[Any], model: nn.Module) -> Graph:
    """The graph with its weights under the names that they have in the model."""
    names = {id(tensor): name for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    graph = graph.copy()
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            old = str(node.target)
            place = old.removeprefix("weight_")
            new = names.get(id(given[int(place)]), old) if place.isdigit() and old.startswith("weight_") else old
            constants[new] = graph.constants[old]
            node.target = new
    graph.constants = constants
    return graph


def _with_all_inputs(graph: Graph, order: Sequence[int], example: Sequence[Tensor]) -> Graph:
    """The graph with one input per user tensor in the user's order; those that Dynamo dropped are there, unused."""
    made = dict(zip(order, graph.inputs, strict=True))
    after = next(node for node in graph.nodes if node.op != "placeholder")
    for place, tensor in enumerate(example):
        after.prepend(made.get(place) or graph.input(f"unused_{place}", graph.fake(tensor)))
    return graph
