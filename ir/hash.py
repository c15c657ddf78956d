"""Hashes of graphs: equal for the same structure, whatever the names; with weights, also for the same values only."""

from __future__ import annotations

import hashlib
import re

from paretorch.ir.graph import Graph
from paretorch.ir.text import print_graph, tensor_hash


def structural_hash(graph: Graph, *, weights: bool = False) -> str:
    """sha256 over ops, attributes, types and how values flow; names of inputs, constants and the graph do not enter.

    weights: let the values of constants enter as well.
    """
    text = print_graph(graph, hashes=False)
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names.setdefault(str(node.target), f"{'input' if node.op == 'placeholder' else 'const'}{len(names)}")
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", names[name], text)
    digest = hashlib.sha256(text.split("(", 1)[1].encode())
    if weights:
        for name in names:
            if name in graph.constants:
                digest.update(tensor_hash(graph.constants[name]).encode())
    return digest.hexdigest()
