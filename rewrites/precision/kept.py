"""What is computed from constants once and kept for all plans of a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """make(tensor), computed again only when the tensor was edited in place; forgotten with the tensor."""

    def __init__(self, make: Callable[[Tensor], Made]) -> None:
        self._make, self._made = make, WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> Made:
        version = 0 if tensor.is_inference() else tensor._version
        if tensor not in self._made or self._made[tensor][0] != version:
            self._made[tensor] = version, self._make(tensor.detach())
        found: Made = self._made[tensor][1]
        return found
