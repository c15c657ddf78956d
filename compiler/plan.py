"""A plan: the chosen rewrites, as data. It prints, diffs, saves as JSON, and applies again to the same architecture with other weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretorch.ir.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

    from paretorch.optimized import Optimized

Knob = int | float | str | None
FORMAT = 1
WITHOUT_WEIGHTS = "made without weights"  # in the evidence of a plan: numbers that are weights were not known when it was made


@dataclass(frozen=True)
class Choice:
    """One chosen rewrite. rule: its name; site: a name that the rule gave; knob: how strongly, None for exact rules."""

    rule: str
    site: str
    knob: Knob = None

    def __str__(self) -> str:
        return f"{self.rule} at {self.site}" + ("" if self.knob is None else f" = {self.knob}")


@dataclass(frozen=True)
class Plan:
    """Choices in the order in which they are applied.

    exact: names of the exact rules that were applied before the choices; runtime: what executes the result;
    fingerprint: structural hash of the normalized graph that the sites belong to.
    """

    choices: tuple[Choice, ...] = ()
    exact: tuple[str, ...] = ()
    runtime: str = "eager"
    fingerprint: str = ""
    evidence: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        exact = ", ".join(self.exact) or "none"
        lines = [f"plan for {self.runtime}", f"  exact: {exact}", *(f"  {choice}" for choice in self.choices)]
        return "\n".join(lines)

    def diff(self, other: Plan) -> str:
        """What `other` has more (+) and less (-), a line each; empty if the plans are the same."""
        ours, theirs = set(map(str, self.choices)), set(map(str, other.choices))
        lines = [f"- {c}" for c in map(str, self.choices) if c not in theirs] + [f"+ {c}" for c in map(str, other.choices) if c not in ours]
        if self.runtime != other.runtime:
            lines.insert(0, f"runtime {self.runtime} -> {other.runtime}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same plan gives the same text, to the byte."""
        body = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "runtime": self.runtime,
            "exact": list(self.exact),
            "choices": [[choice.rule, choice.site, choice.knob] for choice in self.choices],
            "evidence": self.evidence,
        }
        return json.dumps(body, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError if the text is no plan of this format."""
        try:
            body = json.loads(text)
            if body["format"] != FORMAT:
                raise PlanError(f"this plan has format {body['format']}; this version of paretorch reads format {FORMAT}")
            choices = tuple(Choice(rule, site, knob) for rule, site, knob in body["choices"])
            return cls(choices, tuple(body["exact"]), body["runtime"], body["fingerprint"], body.get("evidence", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this text is not a saved plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises ArtifactError if the path cannot be written."""
        from paretorch.artifact import write_text

        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises PlanError if the file is missing or is no plan."""
        try:
            return cls.from_json(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error

    def apply(self, model: nn.Module, example_inputs: Any, **options: Any) -> Optimized:
        """Apply the same choices to a model of the same architecture, without any search; options as for `optimize`.

        Raises PlanError if the model's graph is not the one that this plan was made for.
        """
        from paretorch.replay import replay

        return replay(self, model, example_inputs, **options)
