"""The graph: a thin wrapper over one torch.fx.Graph whose nodes all have types.

Inputs are placeholders, weights and other constants are get_attr nodes that name an entry of `constants`, everything else is a call of an
ATen or `paretorch::` overload (or of an `operator` function on sizes), and one output node returns a flat tuple.
A graph is a value: a rewrite takes a `copy()`, edits that, and returns it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from paretorch.ir.errors import ShapeError
from paretorch.ir.types import TensorType, Type, from_fake


@dataclass(frozen=True)
class Origin:
    """Where in the user's model a node comes from. path: module path, "blocks.3.norm"; source: "model.py:112"."""

    path: str = ""
    source: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.path, self.source) if part) or "the model"


def new_fake_mode() -> FakeTensorMode:
    """A mode in which types are computed; one per captured model, shared by all graphs that come from it."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values beside its type; those of a model without weights have none."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


class Graph:
    """Named inputs, nodes in topological order, outputs.

    Each node's meta holds: "val" (fake tensor, its type), "origin" (Origin), and on nodes that a rewrite made "rule" and "site".
    """

    def __init__(self, name: str = "model", fake_mode: FakeTensorMode | None = None) -> None:
        self.name = name
        self.fx = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.fake_mode = fake_mode or new_fake_mode()
        self.edits = 0
        self._is_draft = False

    # reading

    @property
    def nodes(self) -> list[Node]:
        return list(self.fx.nodes)

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.fx.nodes if node.op == "call_function"]

    @property
    def inputs(self) -> list[Node]:
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def output_node(self) -> Node:
        last: Node = next(iter(reversed(self.fx.nodes)))
        return last

    @property
    def outputs(self) -> list[Any]:
        """The returned values, flat; a node, or None or a number where the model returns one."""
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def node(self, name: str) -> Node | None:
        """The node of that name, or None."""
        return next((node for node in self.fx.nodes if node.name == name), None)

    def constant(self, node: Any) -> Tensor | None:
        """The tensor behind a constant node; None for any other node."""
        is_constant = isinstance(node, Node) and node.op == "get_attr"
        return self.constants[node.target] if is_constant else None

    def known(self, node: Any) -> Tensor | None:
        """As `constant`, where its values can be read: not those of a model without weights."""
        tensor = self.constant(node)
        return tensor if tensor is not None and has_values(tensor) else None

    @property
    def has_weights(self) -> bool:
        """Whether every constant has values, so that the graph can be run."""
        return all(map(has_values, self.constants.values()))

    def __str__(self) -> str:
        from paretorch.ir.text import print_graph

        return print_graph(self)

    # running

    def module(self) -> fx.GraphModule:
        """The graph as a GraphModule that takes the flat inputs and returns a flat tuple."""
        used = {node.target: self.constants[node.target] for node in self.fx.nodes if node.op == "get_attr"}
        plain = fx.Graph()
        copies: dict[Node, Node] = {}
        for node in self.fx.nodes:
            copies[node] = plain.node_copy(node, lambda n: copies[n])
            copies[node].meta = {}
        return fx.GraphModule(used, plain, class_name="ParetorchGraph")

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Run as plain torch. inputs: one tensor per graph input, flat."""
        results: tuple[Any, ...] = self.module()(*inputs)
        return results

    # editing: only on a copy that nobody else holds

    def copy(self) -> Graph:
        """A graph with the same nodes and names; tensors and fake values are shared."""
        other = Graph(self.name, self.fake_mode)
        other.constants = dict(self.constants)
        copies: dict[Node, Node] = {}
        for node in self.fx.nodes:
            twin = other.fx.node_copy(node, lambda n: copies[n])
            twin.meta = dict(node.meta)
            copies[node] = twin
        return other

    def draft(self) -> Graph:
        """A copy that `edit` hands out itself, so that many rewrites share one copy; for one owner, who keeps it if all of them end well."""
        other = self.copy()
        other._is_draft = True
        return other

    def settled(self) -> Graph:
        """This graph, no longer a draft."""
        self._is_draft = False
        return self

    def edit(self) -> Graph:
        """What a rewrite may edit: a copy, or this graph while it is a draft. Asked for once the rewrite is sure to be made."""
        other = self if self._is_draft else self.copy()
        other.edits += 1
        return other

    def input(self, name: str, fake: Any) -> Node:
        """Append an input whose type is that of `fake`, a tensor of this graph's fake mode or a symbolic number."""
        anchor = next((node for node in self.fx.nodes if node.op != "placeholder"), None)
        with self.fx.inserting_before(anchor) if anchor else _nothing():
            node = self.fx.placeholder(name)
        node.meta["val"] = fake
        return node

    def add_constant(self, name: str, tensor: Tensor, before: Node | None = None) -> Node:
        """A node for this tensor; the name is made unique, an equal name with the same tensor is shared."""
        unique, n = name, 0
        while unique in self.constants and self.constants[unique] is not tensor:
            n += 1
            unique = f"{name}_{n}"
        self.constants[unique] = tensor.detach() if tensor.requires_grad else tensor  # the same object, so that it is found shared again
        place = before or next((node for node in self.fx.nodes if node.op != "placeholder"), None)
        with self.fx.inserting_before(place) if place else _nothing():
            node = self.fx.create_node("get_attr", unique)
        node.meta["val"] = self.fake(tensor)
        return node

    def fake(self, tensor: Tensor) -> Any:
        """The fake twin of a real tensor, with static sizes."""
        return self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, before: Node | None = None) -> Node:
        """Add a call and give it a type. Raises ShapeError if the op refuses the types of its arguments."""
        kwargs = kwargs or {}
        fake = self.evaluate(target, args, kwargs)
        with self.fx.inserting_before(before) if before is not None else _nothing():
            node = self.fx.create_node("call_function", target, tuple(args), kwargs, name=_hint(target))
        node.meta["val"] = fake
        return node

    def evaluate(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The fake result of a call. Raises ShapeError.

        Ops that C++ defines by other ops (constant_pad_nd) take the example's sizes for symbols; the Python dispatcher runs their Python form.
        """
        values = fx.node.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
        try:
            with self.fake_mode, torch.no_grad(), enable_python_dispatcher():
                return target(*values[0], **values[1])
        except Exception as error:
            types = [str(type_of(arg)) if isinstance(arg, Node) else repr(arg) for arg in args]
            raise ShapeError(f"{target}({', '.join(types)}) does not fit: {str(error).splitlines()[0]}") from error

    def set_outputs(self, values: Sequence[Any]) -> None:
        """Set what the graph returns, a flat sequence."""
        if self.fx.nodes and self.output_node.op == "output":
            self.output_node.args = (tuple(values),)
        else:
            self.fx.output(tuple(values))

    def replace(self, old: Node, new: Node, *, but: Iterable[Node] = ()) -> None:
        """Let every user of `old` use `new` instead, except the nodes in `but` and `new` itself."""
        keep = {new, *but}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep, propagate_meta=False)

    def clean(self) -> Graph:
        """Remove nodes that nothing uses and constants that no node names; returns self."""
        for node in reversed(self.nodes):
            if node.op in ("call_function", "get_attr") and not node.users and not _has_effect(node):
                self.fx.erase_node(node)
        named = {node.target for node in self.fx.nodes if node.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in named}
        return self

    def retype(self, changed: Iterable[Node] | None = None) -> Graph:
        """Compute the types of all nodes downstream of `changed` again (of all nodes if None); returns self. Raises ShapeError."""
        dirty = None if changed is None else set(changed)
        for node in self.fx.nodes:
            stale = dirty is None or any(argument in dirty for argument in node.all_input_nodes)
            if node.op == "call_function" and stale:
                before = node.meta.get("val")
                node.meta["val"] = self.evaluate(node.target, node.args, dict(node.kwargs))
                if dirty is not None and (before is None or from_fake(before) != from_fake(node.meta["val"])):
                    dirty.add(node)
        return self


@contextmanager
def _nothing() -> Any:
    yield


def _hint(target: Any) -> str:
    """The name to start a node's name from: "linear" for aten.linear.default."""
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", "value")


def _has_effect(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def type_of(node: Node) -> Type:
    """The type of the value that this node makes."""
    return from_fake(node.meta["val"])


def tensor_type(node: Node) -> TensorType:
    """The type of a node that makes one tensor. Raises ShapeError for any other."""
    found = type_of(node)
    if not isinstance(found, TensorType):
        raise ShapeError(f"{node.name} makes {found}; expected one tensor")
    return found


def shape_of(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor node: ints, or sympy expressions."""
    return tensor_type(node).shape


def origin_of(node: Node) -> Origin:
    origin: Origin = node.meta.get("origin", Origin())
    return origin


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, defaults filled in; operator functions have a0, a1, …"""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {f"a{i}": arg for i, arg in enumerate(node.args)}
    bound = {}
    for i, parameter in enumerate(schema.arguments):
        if i < len(node.args):
            bound[parameter.name] = node.args[i]
        elif parameter.name in node.kwargs:
            bound[parameter.name] = node.kwargs[parameter.name]
        else:
            bound[parameter.name] = parameter.default_value
    return bound


def item(graph: Graph, node: Node, index: int, before: Node | None = None) -> Node:
    """The node that takes one output of an op with several."""
    return graph.call(operator.getitem, (node, index), before=before)
