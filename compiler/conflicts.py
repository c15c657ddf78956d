"""Which choices do not go together: by what their rules declare to read and invalidate, or as was found when the pair was tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from paretorch.ir.graph import Graph
from paretorch.plan import Choice
from paretorch.rewrites.rule import Rule, Site


class Conflicts:
    """Pairs of choices that exclude each other, on one graph. Asked before a plan is tried; a pair that failed once is never tried again."""

    def __init__(self, graph: Graph, rules: Iterable[Rule]) -> None:
        self.graph, self.rules = graph, {rule.name: rule for rule in rules}
        self._found: dict[tuple[Choice, Choice], str] = {}
        self._behind: dict[str, set[Node]] = {}

    def first(self, ordered: Sequence[Choice]) -> tuple[Choice, str] | None:
        """The first choice that does not go with one applied before it, and why; None if no pair is known to clash."""
        for place, choice in enumerate(ordered):
            for earlier in ordered[:place]:
                reason = self.between(earlier, choice)
                if reason is not None:
                    return choice, reason
        return None

    def between(self, earlier: Choice, later: Choice) -> str | None:
        """Why `later` cannot be applied after `earlier`; None if nothing is known against it."""
        return self._found.get((earlier, later)) or self._declared(earlier, later)

    def learn(self, earlier: Choice, later: Choice, reason: str) -> str:
        """Keep that this pair failed; returns the sentence that names both."""
        self._found[earlier, later] = f"in conflict with {earlier}: {reason}"
        return self._found[earlier, later]

    def _declared(self, earlier: Choice, later: Choice) -> str | None:
        if earlier.site == later.site and all("token_count" in self.rules[choice.rule].invalidates for choice in (earlier, later)):
            return f"in conflict with {earlier}: one place takes one rule that makes the tokens behind it fewer"
        lost = self.rules[earlier.rule].invalidates & self.rules[later.rule].reads
        if not lost or not self._is_behind(later.site, earlier.site):
            return None
        return f"in conflict with {earlier}: it changes the {', '.join(sorted(lost)).replace('_', ' ')} that {later.rule} reads downstream of it"

    def _is_behind(self, site: str, other: str) -> bool:
        """Whether a site is computed from another one's value. A site of the whole model is behind none."""
        if other not in self._behind:
            start = self.graph.node(Site(other).parts[0])
            self._behind[other] = _users(start) if start is not None else set()
        node = self.graph.node(Site(site).parts[0])
        return node is not None and node in self._behind[other]


def _users(start: Node) -> set[Node]:
    """All that is computed from a value, without it."""
    found: set[Node] = set()
    todo = list(start.users)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.users
    return found
