"""The second rung of capture: Dynamo's full graph, recorded by a backend of our own, then traced to ATen and exported again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paretorch.ir.errors import CaptureError

if False:  # typing only; capture imports this module
    from paretorch.capture import Program


class Recorded(nn.Module):
    """A graph that Dynamo recorded, with the weights it lifted as attributes: takes the tensors that vary, returns the model's output."""

    def __init__(self, module: fx.GraphModule, fixed: dict[int, Tensor], count: int, rebuild: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.count, self.rebuild, self.places = module, count, rebuild, sorted(fixed)
        for place, tensor in fixed.items():
            self.register_buffer(f"weight_{place}", tensor)

    def forward(self, *tensors: Tensor) -> Any:
        given, inputs = iter(tensors), []
        for place in range(self.count):
            inputs.append(getattr(self, f"weight_{place}") if place in self.places else next(given))
        return self.rebuild(self.module(*inputs))


def from_dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Any) -> Program:
    """Raises whatever Dynamo or export raise, and CaptureError where the result is not the model's."""
    from paretorch.capture import Program, _from_export
    from paretorch.signature import Signature, leaf_of, parameters_of

    if dims:
        raise CaptureError("Dynamo's graph is used with fixed sizes only")
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def record(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((module, list(inputs)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = torch.compile(model, backend=record, fullgraph=True, dynamic=False)(*args, **kwargs)
    torch._dynamo.reset()
    if len(graphs) != 1:
        raise CaptureError(f"Dynamo made {len(graphs)} graphs; one is needed")
    module = graphs[0][0]
    owned = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    names = {id(tensor): place for place, tensor in enumerate(given)}
    real = _real_inputs(module, model, given)
    fixed = {place: tensor for place, tensor in enumerate(real) if id(tensor) in owned or id(tensor) not in names}
    order = [names[id(tensor)] for place, tensor in enumerate(real) if place not in fixed]
    leaves, spec = pytree.tree_flatten(expected)
    recorded = Recorded(module, {p: t.detach() for p, t in fixed.items()}, len(real), lambda out: out).eval()
    flat = tuple(given[place] for place in order)
    with torch.no_grad():
        results = recorded(*flat)
    outputs = _match_outputs(leaves, list(results))
    exported = torch.export.export(recorded, flat, strict=False)
    inner = _from_export(exported, recorded, flat, {})
    parameters, defaults = parameters_of(model.forward)
    keyed, in_spec = pytree.tree_flatten_with_path((args, kwargs))
    positional = tuple(name for name, _, _ in parameters[: len(args)])
    found = tuple(leaf_of(f"input {i}", value, None) for i, (_, value) in enumerate(keyed))
    plain = {name: value for name, value in defaults.items() if value is None or isinstance(value, (int, float, str, bool))}
    signature = Signature(parameters, positional, tuple(kwargs), in_spec, found, spec, outputs, plain)
    graph = _reordered(inner.graph, order, given)
    return Program(graph, tuple(given), signature, model, (), list(inner.notes))


def _real_inputs(module: fx.GraphModule, model: nn.Module, given: list[Tensor]) -> list[Tensor]:
    """The real tensor behind each placeholder: a lifted weight, found by its recorded source, or one of the user's inputs."""
    found = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        source = node.meta.get("example_value")
        name = getattr(getattr(node, "_dynamo_source", None), "name", None)
        found.append(_lookup(name() if callable(name) else str(name), source, model, given))
    return found


def _lookup(name: str, example: Any, model: nn.Module, given: list[Tensor]) -> Tensor:
    candidates = [*model.parameters(), *model.buffers(), *given]
    if name.startswith("L["):
        try:
            tensor = eval(name, {"L": {"self": model}})  # Dynamo's own expression for where it read the weight
            if isinstance(tensor, Tensor):
                return tensor
        except (AttributeError, KeyError, IndexError, TypeError):
            pass
    same = [t for t in candidates if t.shape == example.shape and t.dtype == example.dtype]
    if len(same) == 1:
        return same[0]
    raise CaptureError(f"Dynamo's input {name} cannot be matched to one weight or input of the model")


def _match_outputs(leaves: list[Any], results: list[Any]) -> tuple[tuple[str, Any], ...]:
    """Which result each leaf of the output is; leaves that are no tensor keep the value they had."""
    outputs: list[tuple[str, Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            outputs.append(("value", leaf))
            continue
        same = [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.shape == leaf.shape and torch.equal(r, leaf)]
        if not same:
            raise CaptureError("an output of the model is not among the results of Dynamo's graph")
        outputs.append(("result", same[0]))
    return tuple(outputs)


def _reordered(graph: Any, order: list[int], given: list[Tensor]) -> Any:
    """The graph with one input per user tensor in the user's order; inputs that Dynamo dropped are added unused."""
    made = graph.inputs
    by_place = dict(zip(order, made, strict=True))
    anchor = made[0] if made else graph.nodes[0]
    for place, tensor in enumerate(given):
        if place not in by_place:
            with graph.fx.inserting_before(anchor):
                node = graph.fx.placeholder(f"unused_{place}")
            node.meta["val"] = graph.fake(tensor)
            by_place[place] = node
    for place in range(len(given)):
        if by_place[place] is not anchor or place:
            graph.nodes[0].prepend(by_place[place]) if place == 0 else by_place[place - 1].append(by_place[place])
    return graph
