"""A linear probe: logistic regression on frozen features, by LBFGS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """features: f32[n, C]; penalty: weight of the squared norm per sample. The standardisation is folded into the layer."""
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / spread
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), labels) + 0.5 * penalty * layer.weight.square().sum() / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        layer.weight.div_(spread)
        layer.bias.sub_(layer.weight @ mean)
    return layer.requires_grad_(False)
