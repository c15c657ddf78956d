"""Tensors for a region's reads, so that its kernel can be run without its graph: of the real sizes, strides and types, with made-up numbers."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.kernel import Region
from paretorch.codegen.kernel_file import EXAMPLE_SIZE


def region_inputs(region: Region, device: torch.device | str) -> list[Tensor]:
    """One tensor a read. Symbolic sizes are those of the example; whole numbers are ones, which divide, index and count without harm."""
    return [_made(node.meta["val"], device) for node in region.reads]


def _made(fake: Any, device: torch.device | str) -> Tensor:
    shape, stride = [example_size(size) for size in fake.shape], [example_size(step) for step in fake.stride()]
    count = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if prod(shape) else 1
    if fake.dtype == torch.bool:
        values = torch.rand(count, device=device) > 0.5
    elif fake.dtype.is_floating_point:
        values = torch.empty(count, dtype=fake.dtype, device=device).normal_()
    else:
        values = torch.ones(count, dtype=fake.dtype, device=device)
    return values.as_strided(shape, stride)


def example_size(size: Any) -> int:
    """The example's value of a size; a size that depends on values has none, and is what it is in a file that runs alone."""
    if isinstance(size, int):
        return size
    found = size.node.expr.subs(size.node.shape_env.var_to_val)
    return int(found.subs(dict.fromkeys(found.free_symbols, EXAMPLE_SIZE)))


def size_class(region: Region) -> str:
    """What a choice of schedule holds for: symbolic sizes up to the next power of two; fixed ones stand in the kernel's text."""
    classes = {}
    for node in region.reads:
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                classes[str(size.node.expr)] = 1 << max(example_size(size) - 1, 0).bit_length()
    return ", ".join(f"{name} <= {most}" for name, most in sorted(classes.items()))
