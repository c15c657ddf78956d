"""The graph of a deep model with fewer of its equal layers: what a rewrite of one layer saves can be priced on it, whatever the depth.

Layers are runs of blocks of a residual stream whose classes (see the repetition analysis) recur with a period. From the middle of such a run layers
are taken out until KEPT are left; nodes of the others keep their names, so that sites there are the same sites.
"""

from __future__ import annotations

from collections.abc import Sequence

from paretorch.ir.analyze import Facts, Stream
from paretorch.ir.graph import Graph, type_of

KEPT = 8  # layers: enough for the first, some inner and the last to differ as they do in the whole


def shortened(graph: Graph, facts: Facts) -> Graph:
    """A graph with at most KEPT layers of each run of equal ones; the same graph if there is nothing to take out."""
    short = graph.copy()
    nodes = {node.name: node for node in short.nodes}
    is_cut = False
    for stream in facts.streams:
        start, period, count = _longest_run(_classes(stream, facts))
        if count <= KEPT:
            continue
        first = start + KEPT // 2 * period
        before, after = stream.blocks[first].before, stream.blocks[first + (count - KEPT) * period - 1].after
        one, other = nodes[before], nodes[after]
        if type_of(one) == type_of(other) and one.meta["val"].stride() == other.meta["val"].stride():
            short.replace(other, one)
            is_cut = True
    return short.clean() if is_cut else graph


def _classes(stream: Stream, facts: Facts) -> list[int]:
    """The class of each block; a number of its own for one that is like no other."""
    places = facts.repetition.places
    return [places[block.after][0] if block.after in places else -1 - number for number, block in enumerate(stream.blocks)]


def _longest_run(classes: Sequence[int]) -> tuple[int, int, int]:
    """(start, period, whole periods) of the longest part of a sequence that repeats with a period; the shortest period of those as long."""
    best = (0, 1, 0)
    for period in range(1, len(classes) // 2 + 1):
        start = 0
        for place in range(period, len(classes) + 1):
            if place == len(classes) or classes[place] != classes[place - period]:
                count = (place - start) // period
                if count > 1 and count * period > best[1] * best[2]:
                    best = (start, period, count)
                start = place - period + 1
    return best
