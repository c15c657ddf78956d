"""What rules that fold constants into weights share: reading constants in float64, making new ones from them, looking through views."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from paretorch.ir.builder import Builder
from paretorch.ir.errors import ShapeError
from paretorch.ir.graph import Graph, arguments
from paretorch.ir.ops import aten, is_op

_DERIVED: Any = WeakTensorKeyDictionary()  # first source -> {what and the other sources' ids: (weak other sources, weak result)}


def wide(graph: Graph, node: Any) -> Tensor | None:
    """A floating constant in float64; None for any other node."""
    held = graph.constant(node)
    return held.double() if held is not None and held.dtype.is_floating_point else None


def is_fixed(graph: Graph, *values: Any) -> bool:
    """Whether every value is absent, or a floating constant of the graph."""
    held = [graph.constant(value) for value in values if value is not None]
    return all(tensor is not None and tensor.dtype.is_floating_point for tensor in held)


def derive(b: Builder, name: str, what: Hashable, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Node:
    """A constant computed from others, in the dtype of the first. Layers that share weights share what is derived from them.

    what: together with the sources says what `make` computes. Sources are copied from, never edited.
    """
    first, *others = sources
    known = _DERIVED.setdefault(first, {})
    key = (what, *map(id, others))
    weak, made = known.get(key, ((), None))
    tensor = made() if made is not None and all(ref() is other for ref, other in zip(weak, others, strict=True)) else None
    if tensor is None:
        tensor = make().to(first.dtype).contiguous()
        known[key] = (tuple(map(TensorWeakRef, others)), TensorWeakRef(tensor))
    return b.constant(name, tensor)


def held(graph: Graph, *nodes: Any) -> list[Tensor]:
    """The tensors of those nodes that are there."""
    return [tensor for node in nodes if (tensor := graph.constant(node)) is not None]


def argument(node: Node, place: int) -> Any:
    """An argument by its place in the schema, wherever the call gives it; its default if it does not."""
    return list(arguments(node).values())[place]


def short(node: Any) -> str:
    """The name of a constant, for the name of one that is derived from it."""
    return str(node.target).replace(".", "_")


def through(node: Node, *ops: str) -> Iterator[Node]:
    """Every user of this value, seen through ops that only re-describe it."""
    for user in node.users:
        if is_op(user, *ops):
            yield from through(user, *ops)
        else:
            yield user


def only_user(node: Node) -> Node | None:
    """The one node that uses this value, once; None if there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def holders(graph: Graph, constant: Any) -> list[Node]:
    """Every node that uses the tensor behind a constant, under any name."""
    tensor = graph.constant(constant)
    return [user for node in graph.nodes if node.op == "get_attr" and graph.constants[str(node.target)] is tensor for user in node.users]


def restride(graph: Graph, changed: Sequence[Node]) -> None:
    """Compute again what is downstream of values whose strides changed; a view that these forbid becomes a reshape."""
    dirty = set(changed)
    for node in graph.calls:
        if node in dirty or not any(argument in dirty for argument in node.all_input_nodes):
            continue
        before = node.meta["val"]
        try:
            node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))
        except ShapeError:
            if node.target is not aten("view.default"):
                raise
            node.target = aten("reshape.default")
            node.meta["val"] = graph.evaluate(node.target, node.args, dict(node.kwargs))
        if not isinstance(before, Tensor) or _strides(before) != _strides(node.meta["val"]):
            dirty.add(node)


def _strides(value: Tensor) -> list[str]:
    return [str(stride) for stride in value.stride()]  # as text: comparing symbols would bind them
