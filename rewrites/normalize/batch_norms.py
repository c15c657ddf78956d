"""One spelling for batch norm in eval: `batch_norm`, where decomposition left the form with three outputs."""

from __future__ import annotations

from torch.fx import Node

from paretorch.ir.builder import Builder
from paretorch.ir.graph import Graph, arguments, origin_of, tensor_type
from paretorch.ir.ops import aten, is_op


def batch_norms(graph: Graph) -> Graph:
    """The same function with `aten.batch_norm` in eval mode."""
    graph = graph.copy()
    for node in graph.calls:
        if node.target is aten("_native_batch_norm_legit_no_training.default"):
            _replace(graph, node)
    return graph.clean()


def _replace(graph: Graph, node: Node) -> None:
    users = list(node.users)
    if not all(is_op(user, "getitem") for user in users) or any(user.args[1] != 0 and user.users for user in users):
        return
    a = arguments(node)
    b = Builder(graph, node, origin=origin_of(node))
    given = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], False, a["momentum"], a["eps"], False)
    made = b.call(aten("batch_norm.default"), given)
    for user in users:
        if user.args[1] == 0 and tensor_type(made) == tensor_type(user):
            graph.replace(user, made)
