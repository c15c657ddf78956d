"""The demo's model: a small vision transformer with a convolutional stem, 28x28 images, 196 patches and a class token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block. x: f32[B, T, C] -> f32[B, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        packed = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.project(mixed)
        grown: Tensor = self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))
        return x + grown


class FashionViT(nn.Module):
    """images: f32[B, 1, 28, 28] in [0, 1] -> logits f32[B, 10]."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, width, 3, padding=1),
        )  # fmt: skip
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor, kept_patches: int | None = None) -> Tensor:
        patches = self.stem(images).flatten(2).transpose(1, 2) + self.position[:, 1:]
        if kept_patches is not None:
            order = torch.rand(patches.shape[:2], device=images.device).argsort(1)[:, :kept_patches, None]
            patches = patches.gather(1, order.expand(-1, -1, patches.shape[2]))
        token = (self.class_token + self.position[:, :1]).expand(images.shape[0], -1, -1)
        x = torch.cat([token, patches], 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
