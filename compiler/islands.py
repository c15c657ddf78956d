"""The last rung of capture: when the whole model cannot be captured, its largest submodules that can be are, with eager glue between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from paretorch.ir.errors import CaptureError

if TYPE_CHECKING:
    from torch import nn


def from_islands(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> NoReturn:
    """Raises CaptureError."""
    raise CaptureError(f"the model cannot be captured. {why}")
