"""What the rules about batch norm in eval share: it is a fixed scale and shift of each channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.graph import Graph, arguments
from paretorch.rewrites.block_fusion.weights import wide


def affine(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """(scale, shift), f64[C]: batch_norm(x) = x * scale + shift. Its statistics are constants of the graph."""
    a = arguments(norm)
    mean, variance, gain, shift = (wide(graph, a[name]) for name in ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None and variance is not None  # the rules' sites said so  # noqa: PT018
    scale = (variance + a["eps"]).rsqrt() * (gain if gain is not None else 1.0)
    return scale, (shift if shift is not None else torch.zeros_like(mean)) - mean * scale
