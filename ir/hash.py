"""Hashes of graphs: equal for the same structure, whatever the names; with weights, also for the same values only."""

from __future__ import annotations

import hashlib

from paretorch.ir.graph import Graph
from paretorch.ir.text import constants_in_order, print_plain, tensor_hash


def structural_hash(graph: Graph, *, weights: bool = False) -> str:
    """sha256 over ops, attributes, types and how values flow; names of inputs, constants and the graph do not enter.

    weights: let the values of constants enter as well.
    """
    digest = hashlib.sha256(print_plain(graph).encode())
    if weights:
        for name in constants_in_order(graph):
            digest.update(tensor_hash(graph.constants[name]).encode())
    return digest.hexdigest()
