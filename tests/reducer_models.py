"""Small models that carry a trained token reducer of their own: learned masks that hide tokens, and pools that make few tokens of many.

Written from the published algorithms: MrT5's gate (arXiv:2410.20771), DynamicViT's policy (arXiv:2106.02034), the slimming module of Self-slimmed
ViT (arXiv:2111.12624), gated pooling (arXiv:1802.04712), a resampler of learned queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Attention, Block, FeedForward

C, H = 8, 2
HIDDEN, NOTHING = -30.0, -1e9  # what MrT5's gate adds at most; what leaves nothing


class Gated(nn.Module):
    """x: [B, T, C] through a block, a gate and two more blocks. hard: tokens under the threshold are hidden wholly; read: what is made of it;
    relative: a bias for each pair of places; seen: i64[B, T] hides padding too."""

    def __init__(self, read: str = "class", hard: bool = True, relative: int = 0, causal: bool = False, stages: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm = nn.ModuleList(Block(C, H) for _ in range(2 + stages)), nn.LayerNorm(C)
        self.gates, self.read, self.hard, self.causal = nn.ModuleList(nn.Linear(C, 1) for _ in range(stages)), read, hard, causal
        self.bias = nn.Parameter(torch.randn(1, H, relative, relative)) if relative else None

    def gate(self, number: int, x: Tensor) -> Tensor:
        """What is added to the scores of each key, [B, 1, 1, T]."""
        score = self.gates[number](self.norm(x))[..., 0]
        if self.hard:
            kept = (score > 0) | (torch.arange(x.shape[1]) == 0)  # the first token always stays
            return torch.where(kept, 0.0, NOTHING).to(x.dtype)[:, None, None, :]
        return HIDDEN * torch.sigmoid(-10 * score)[:, None, None, :]

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        padding = 0.0 if seen is None else (1.0 - seen[:, None, None, :].to(x.dtype)) * NOTHING
        bias = 0.0 if self.bias is None else self.bias
        x = self.blocks[0](x, bias + padding if isinstance(bias, Tensor) or isinstance(padding, Tensor) else None)
        mask: Tensor | float = padding
        for number in range(len(self.gates)):
            mask = mask + self.gate(number, x)
            x = self.blocks[number + 1](x, bias + mask)
        x = self.norm(self.blocks[-1](x, bias + mask))
        if self.read in ("class", "dense"):
            return x[:, 0] if self.read == "class" else x
        weight = (mask[:, 0, 0, :, None] > HIDDEN / 2).to(x.dtype)
        return x.mean(1) if self.read == "mean" else (x * weight).sum(1) / weight.sum(1)


class Policy(nn.Module):
    """DynamicViT's masks: two stages decide which tokens stay; the weights of the others are multiplied by 0 and what is left adds up to 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms, self.mixers = nn.ModuleList(nn.LayerNorm(C) for _ in range(3)), nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(3))
        self.feeds, self.scores = nn.ModuleList(FeedForward(C) for _ in range(3)), nn.ModuleList(nn.Linear(2 * C, 2) for _ in range(2))

    def attend(self, number: int, x: Tensor, policy: Tensor) -> Tensor:
        query, key, value = self.mixers[number](self.norms[number](x)).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * (C // H) ** -0.5).softmax(-1) * policy[:, None, None, :, 0]
        x = x + (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
        return x + self.feeds[number](x)

    def forward(self, x: Tensor) -> Tensor:
        policy = torch.ones_like(x[..., :1])
        for number in range(3):
            x = self.attend(number, x, policy)
            if number < 2:
                whole = (x[:, 1:] * policy[:, 1:]).sum(1, keepdim=True) / policy[:, 1:].sum(1, keepdim=True)
                decision = self.scores[number](torch.cat([x[:, 1:], whole.expand_as(x[:, 1:])], -1)).softmax(-1)
                kept = (decision[..., :1] > 0.5).to(x.dtype) * policy[:, 1:]
                policy = torch.cat([torch.ones_like(x[:, :1, :1]), kept], 1)
        return x[:, 0]


class Slimmed(nn.Module):
    """Two blocks, then few tokens from many: each is an average by a learned softmax over the tokens; then a block on those."""

    def __init__(self, form: str = "slim", tokens: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.last, self.form = nn.ModuleList(Block(C, H) for _ in range(2)), Block(C, H), form
        self.norm, self.first, self.second = nn.LayerNorm(C), nn.Linear(C, C // 2), nn.Linear(C // 2, 1 if form == "gated" else tokens)
        self.queries, self.look, self.scale = nn.Parameter(torch.randn(1, tokens, C)), Attention(C, H), nn.Parameter(torch.ones(1))

    def pool(self, x: Tensor) -> Tensor:
        if self.form == "resampler":
            return self.look(self.queries.expand(len(x), -1, -1), self.norm(x))
        scores = self.second(F.gelu(self.first(self.norm(x)))) * self.scale
        if self.form == "gated":
            return (torch.softmax(scores, 1) * x).sum(1, keepdim=True)
        if self.form == "sigmoid":  # TokenLearner: weights that are not a softmax
            return torch.sigmoid(scores).transpose(1, 2) @ x
        return torch.softmax(scores, 1).transpose(1, 2) @ x

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(self.pool(x))
