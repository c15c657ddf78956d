"""Models to predict and to measure: image, text, prefill, convolutional, mixer and speech, from plain modules with random weights.

The models in HELD_BACK were named before the first run and are never used to tune a formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_BACK = ("mixer", "speech encoder", "wide net", "encoder of 1024")
VOCABULARY = 4096


class Block(nn.Module):
    """A pre-norm transformer block; post: norms behind the residuals, as in BERT."""

    def __init__(self, width: int, heads: int, causal: bool = False, post: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.post = heads, causal, post
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    """Patches of an image, a class token, blocks, a head."""

    def __init__(self, width: int, heads: int, depth: int, side: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Text(nn.Module):
    """Token ids to hidden states, or to logits if causal."""

    def __init__(self, width: int, heads: int, depth: int, tokens: int, causal: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal, post=not causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY) if causal else nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(ids) + self.places)))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norms, or an inverted bottleneck with a depthwise one."""

    def __init__(self, channels: int, separable: bool) -> None:
        super().__init__()
        wide = 4 * channels if separable else channels
        middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide if separable else 1, bias=False)
        side = 1 if separable else 3
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, side, padding=side // 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), middle, nn.BatchNorm2d(wide)
        )
        self.last = nn.Conv2d(wide, channels, 1) if separable else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(self.layers(x)))


class Convolutional(nn.Module):
    """A stem and three stages."""

    def __init__(self, channels: int, depth: int, separable: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 4)]
        for stage in range(3):
            layers += [Residual(channels * 2**stage, separable) for _ in range(depth)]
            if stage < 2:
                layers.append(nn.Conv2d(channels * 2**stage, channels * 2 ** (stage + 1), 2, 2))
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Mixer(nn.Module):
    """MLPs over tokens and over channels in turn."""

    def __init__(self, width: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(self.mlp(tokens, 2 * width) for _ in range(depth))
        self.channels = nn.ModuleList(self.mlp(width, 4 * width) for _ in range(depth))

    @staticmethod
    def mlp(width: int, inner: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for place, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * place](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * place + 1](x))
        return x.mean(1)


class Speech(nn.Module):
    """Two strided convolutions over a spectrogram, then blocks."""

    def __init__(self, width: int, heads: int, depth: int, frames: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(80, width, 3, padding=1), nn.Conv1d(width, width, 3, 2, padding=1)
        self.places = nn.Parameter(torch.zeros(1, frames // 2, width))
        self.blocks, self.norm = nn.Sequential(*(Block(width, heads) for _ in range(depth))), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(x)))).transpose(1, 2)
        return self.norm(self.blocks(x + self.places))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def ids(tokens: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(VOCABULARY, (batch, tokens))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "vision of 384": (lambda: Vision(384, 6, 12), images),
    "vision of 192": (lambda: Vision(192, 3, 12), images),
    "encoder of 256": (lambda: Text(256, 4, 4, 128, False), ids(128)),
    "encoder of 128": (lambda: Text(128, 2, 4, 64, False), ids(64)),
    "encoder of 768": (lambda: Text(768, 12, 6, 64, False), ids(64)),
    "prefill": (lambda: Text(512, 8, 6, 512, True), ids(512)),
    "short prefill": (lambda: Text(256, 4, 6, 64, True), ids(64)),
    "residual net": (lambda: Convolutional(32, 2, False), images),
    "separable net": (lambda: Convolutional(24, 3, True), images),
    "mixer": (lambda: Mixer(256, 196, 8), images),
    "speech encoder": (lambda: Speech(384, 6, 4, 600), lambda batch: torch.randn(batch, 80, 600)),
    "wide net": (lambda: Convolutional(64, 1, False), images),
    "encoder of 1024": (lambda: Text(1024, 16, 3, 96, False), ids(96)),
}
