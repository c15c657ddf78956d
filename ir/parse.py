"""The parser of the text form."""

from __future__ import annotations

from torch import Tensor

from paretorch.ir.errors import ArtifactError
from paretorch.ir.graph import Graph


def parse_graph(text: str, constants: dict[str, Tensor] | None = None) -> Graph:
    """Raises ArtifactError."""
    raise ArtifactError("parsing is not there yet")
