"""What the rules of this family share: which attention may be windowed, and the local attention that takes its place."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from paretorch.ir.analyze import Facts, TokenAxis, analyze
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, arguments, origin_of
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match
from paretorch.rewrites.rule import Knob, Refusal, Site
from paretorch.rewrites.sparse_attention.key_bias import key_bias_of, mask_by_pairs

FULL = "full"
WIDTHS = (1024, 512, 256, 128, 64, 32, 16)
VALUES: tuple[Knob, ...] = (FULL, *WIDTHS)
SINKS = 4  # Xiao et al. 2024, table 2: one to four first tokens restore the perplexity of a window


def legal_widths(graph: Graph, axis: TokenAxis, node: Node) -> tuple[int, ...] | str:
    """The windows that pay at this attention, or why none is legal."""
    tokens = axis.atom.size
    if not is_op(node, "attention"):
        kind = "local already" if is_op(node, "local_attention") else f"a {node.target}, not recognised as attention"
        return f"{node.name} ({origin_of(node)}) is {kind}"
    if not isinstance(tokens, int):
        return f"{node.name} ({origin_of(node)}) runs over {tokens} tokens, a number not known before it runs"
    born = graph.node(axis.atom.born)
    if born is not None and is_match(born):
        return f"the tokens of {node.name} were merged by {born.name}; their places no longer say how far apart they are"
    given = arguments(node)
    if given["offset"] != 0 or given["right"] not in (-1, 0):
        return (
            f"{node.name} sees keys at an offset of {given['offset']} up to {given['right']} after it; expected plain or causal attention"
        )
    pairs = mask_by_pairs(node)
    if pairs:
        return pairs
    seen = min(tokens, given["left"] + 1) if given["left"] >= 0 else tokens
    widths = tuple(width for width in WIDTHS if 2 * width < seen)
    few = f"sees {seen} of {tokens} tokens, so no window of {WIDTHS[-1]} or more leaves out half of them"
    return widths or f"{node.name} ({origin_of(node)}) is already local: it {few}"


def offer(rule: str, graph: Graph, facts: Facts) -> Iterator[Site | Refusal]:
    """A site, or a refusal, for each self-attention; it is named by the attention's node."""
    nodes = {node.name: node for node in graph.nodes}
    for axis in facts.axes.tokens:
        for name in axis.mixers:
            found = legal_widths(graph, axis, nodes[name])
            if isinstance(found, str):
                yield Refusal(rule, name, found)
            else:
                yield Site(name, origin_of(nodes[name]).path or name, (FULL, *found))


def narrow(rule: str, graph: Graph, site: Site, knob: Knob, sinks: int) -> Graph:
    """The graph with local attention at the site: a query sees the keys less than `knob` places away, and the first `sinks`.

    Raises PlanError if the site is gone or the width is not legal there.
    """
    if knob == FULL:
        return graph
    axis = next((axis for axis in analyze(graph).axes.tokens if site.name in axis.mixers), None)
    graph = graph.copy()
    node = graph.node(site.name)
    if node is None or axis is None:
        raise PlanError(f"{rule}: no self-attention is named {site.name} here; an earlier rewrite took it out or changed it")
    legal = legal_widths(graph, axis, node)
    if isinstance(legal, str) or knob not in legal:
        raise PlanError(f"{rule} at {site.name}: " + (legal if isinstance(legal, str) else f"a window of {knob} is not among {legal}"))
    given, width = arguments(node), int(knob)
    b = Builder(graph, node, origin=origin_of(node), rule=rule, site=site.name)
    new = b.local_attention(
        given["query"], given["key"], given["value"], key_bias_of(b, node), scale=given["scale"], left=width - 1,
        right=0 if given["right"] == 0 else width - 1, sinks=max(sinks, given["sinks"]), block=block_of(width), softcap=given["softcap"],
    )  # fmt: skip
    graph.replace(node, new)
    return graph.clean()


def block_of(width: int) -> int:
    """Queries per block, a power of two: about the window, where on CPU blocks of 32 to 128 were fastest for windows of 32 to 256."""
    return min(max(1 << (width - 1).bit_length(), 32), 128)
