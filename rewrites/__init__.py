"""Rules, in the order in which they are offered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from paretorch.ir.errors import RuleError
from paretorch.rewrites import block_fusion, layer_skipping, precision, sparse_attention, token_merging
from paretorch.rewrites.rule import FAMILIES, Rule

RULES: tuple[Rule, ...] = (
    *block_fusion.RULES,  # exact rules first: the lossy ones below see fewer, larger nodes
    *layer_skipping.RULES,
    *token_merging.RULES,
    *sparse_attention.RULES,
    *precision.RULES,  # last: casts surround what the others left
)


def rules_named(names: Iterable[str]) -> tuple[Rule, ...]:
    """The rules with these names or of these families, in their fixed order. Raises RuleError for a name that is neither."""
    known = {rule.name for rule in RULES} | set(FAMILIES)
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f" Close: {close[0]}." if close else ""
            raise RuleError(f"no rule or family named {name!r}.{hint} Known: {', '.join(sorted(known))}")
    return tuple(rule for rule in RULES if rule.name in wanted or rule.family in wanted)
