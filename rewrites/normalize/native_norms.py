"""One spelling for norms that came with several outputs, as decomposed programs have them: `batch_norm`, `layer_norm` and `group_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op


def native_norms(graph: Graph) -> Graph:
    """The same function with norms of one output, where the other outputs are not used; batch norms in eval mode only."""
    graph = graph.copy()
    for node in graph.calls:
        form = FORMS.get(node.target)
        if form is not None:
            _replace(graph, node, *form(arguments(node)))
    return graph.clean()


def _batch(a: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    given = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], False, a["momentum"], a["eps"], False)
    return aten("batch_norm.default"), given


def _layer(a: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    return aten("layer_norm.default"), (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"])


def _group(a: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    return aten("group_norm.default"), (a["input"], a["group"], a["weight"], a["bias"], a["eps"])


FORMS: dict[Any, Callable[[dict[str, Any]], tuple[Any, tuple[Any, ...]]]] = {
    aten("_native_batch_norm_legit_no_training.default"): _batch,
    aten("native_layer_norm.default"): _layer,
    aten("native_group_norm.default"): _group,
}


def _replace(graph: Graph, node: Node, target: Any, given: tuple[Any, ...]) -> None:
    users = list(node.users)
    if not all(is_op(user, "getitem") for user in users) or any(user.args[1] != 0 and user.users for user in users):
        return
    made = Builder(graph, node, origin=origin_of(node)).call(target, given)
    for user in users:
        if user.args[1] == 0 and tensor_type(made) == tensor_type(user):
            graph.replace(user, made)
