"""transformers' caches as inputs and outputs: any of its cache objects becomes its tensors and a plain description of the rest.

The description is made of lists, strings and numbers only, so that specs compare, and can be written to a file. Nothing is imported unless
transformers is loaded already.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree

from paretorch.ir.errors import CaptureError

HOME = "transformers.cache_utils"


def register_caches() -> None:
    """Register every cache class of transformers that nobody has registered yet; does nothing without transformers."""
    home = sys.modules.get(HOME)
    if home is None:
        return
    base = home.Cache
    for cls in [value for value in vars(home).values() if isinstance(value, type) and issubclass(value, base) and value is not base]:
        if cls not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                cls, take_apart, put_together, serialized_type_name=f"{HOME}.{cls.__name__}", flatten_with_keys_fn=_with_keys
            )


def take_apart(cache: Any) -> tuple[list[Any], Any]:
    """(tensors, description)."""
    leaves: list[Any] = []
    return leaves, _describe(cache, leaves)


def _with_keys(cache: Any) -> tuple[list[tuple[Any, Any]], Any]:
    leaves, description = take_apart(cache)
    return [(pytree.SequenceKey(place), leaf) for place, leaf in enumerate(leaves)], description


def put_together(leaves: Any, description: Any) -> Any:
    """The inverse of `take_apart`."""
    return _rebuild(description, list(leaves))


def _describe(value: Any, leaves: list[Any]) -> Any:
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        leaves.append(value)
        return ["leaf", len(leaves) - 1]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_describe(item, leaves) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[_describe(key, leaves), _describe(item, leaves)] for key, item in value.items()]]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, type):
        return ["class", value.__module__, value.__name__]
    if type(value).__module__ == HOME:
        return ["object", type(value).__name__, _describe(vars(value), leaves)]
    raise CaptureError(f"a cache holds {type(value).__name__}, which has no plain form; pass a cache without offloading")


def _rebuild(description: Any, leaves: list[Any]) -> Any:
    kind, body = description[0], description[1]
    if kind == "leaf":
        return leaves[body]
    if kind in ("list", "tuple"):
        items = [_rebuild(item, leaves) for item in body]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {_rebuild(key, leaves): _rebuild(item, leaves) for key, item in body}
    if kind == "dtype":
        return getattr(torch, body)
    if kind == "device":
        return torch.device(body)
    if kind == "class":
        return getattr(importlib.import_module(body), description[2])
    if kind == "object":
        cls = getattr(sys.modules[HOME], body)
        made = cls.__new__(cls)
        vars(made).update(_rebuild(description[2], leaves))
        return made
    return body
