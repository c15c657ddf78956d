"""Plain-torch models of layouts that no library model here has: diffusion transformers, long skips, resamplers, shared towers, recurrences.

Each takes inputs of any batch. Tokens: 36 (a 6 x 6 grid); width 16, two heads. Seeded by the caller, in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.frame_models import FrameEncoder
from tests.zoo import VOCABULARY, Attention, Block, FeedForward

T, C, H, SIDE = 36, 16, 2, 6


class DiffusionBlock(nn.Module):
    """adaLN-Zero: shift, scale and gate of both halves come from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C, elementwise_affine=False) for _ in range(2))
        self.mix, self.feed, self.modulate = Attention(C, H, packed=True), FeedForward(C), nn.Linear(C, 6 * C)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, second_shift, second_scale, second_gate = self.modulate(F.silu(condition))[:, None].chunk(6, -1)
        x = x + gate * self.mix(self.norms[0](x) * (1 + scale) + shift)
        return x + second_gate * self.feed(self.norms[1](x) * (1 + second_scale) + second_shift)


class DiffusionTransformer(nn.Module):
    """images: f32[B, 4, 12, 12], step: f32[B] -> images: patches, conditioned blocks, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, C, 2, stride=2), nn.Linear(8, C)
        self.position = nn.Parameter(torch.randn(1, T, C))
        self.blocks, self.out = nn.ModuleList(DiffusionBlock() for _ in range(2)), nn.Linear(C, 16)

    def forward(self, images: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None] * torch.arange(1, 5)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(x).view(-1, SIDE, SIDE, 2, 2, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 2 * SIDE, 2 * SIDE)


class ConvAttention(nn.Module):
    """images -> images: convolutions, and attention over the flattened grid in between, as in diffusion U-Nets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 3, 3, padding=1)
        self.norm, self.block, self.text = nn.GroupNorm(4, C), Block(C, H), nn.Linear(8, C)
        self.look, self.look_norm = Attention(C, H), nn.LayerNorm(C)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        x = self.first(images)
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = self.block(y)
        y = y + self.look(self.look_norm(y), self.text(text))
        return self.last(F.silu(x + y.transpose(1, 2).reshape(x.shape)))


class LongSkips(nn.Module):
    """Tokens of early layers are joined to those of late ones, as in U-ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = Block(C, H), Block(C, H), Block(C, H)
        self.join, self.head = nn.Linear(2 * C, C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        early = self.down(x)
        x = self.middle(early)
        return self.head(self.up(self.join(torch.cat([x, early], -1))).mean(1))


class Resampler(nn.Module):
    """Learned queries read an encoder's tokens; the encoder may be merged, the queries are what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.queries = nn.ModuleList(Block(C, H) for _ in range(2)), nn.Parameter(torch.randn(1, 8, C))
        self.norm, self.look, self.feed = nn.LayerNorm(C), Attention(C, H), FeedForward(C)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y = self.queries.expand(x.shape[0], -1, -1)
        y = y + self.look(y, self.norm(x))
        return y + self.feed(y)


class VisionLanguage(nn.Module):
    """A vision tower whose tokens stand before the words of a causal language model; logits of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.bridge = nn.ModuleList(Block(C, H) for _ in range(2)), nn.Linear(C, C)
        self.word, self.layers = nn.Embedding(VOCABULARY, C), nn.ModuleList(Block(C, H, causal=True) for _ in range(2))
        self.head = nn.Linear(C, VOCABULARY)

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        for block in self.tower:
            patches = block(patches)
        x = torch.cat([self.bridge(patches), self.word(ids)], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, patches.shape[1] :])


class Alibi(nn.Module):
    """An encoder whose scores fall with the distance of places, one slope a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(C, H, spelled=True) for _ in range(2))
        distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
        self.register_buffer("bias", -torch.tensor([0.5, 0.25])[:, None, None] * distance)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.bias)
        return x.mean(1)


class MultipleInstances(nn.Module):
    """Gated attention pooling: weights of tokens by a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))
        self.tanh, self.gate, self.weigh, self.head = nn.Linear(C, 8), nn.Linear(C, 8), nn.Linear(8, 1), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        weights = torch.softmax(self.weigh(torch.tanh(self.tanh(x)) * torch.sigmoid(self.gate(x))), 1)
        return self.head((weights * x).sum(1))


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder with a padding mask, batch first; the mean of the tokens that are there."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, H, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        seen = (~padding).to(x.dtype)[..., None]
        return (x * seen).sum(1) / seen.sum(1)


class TorchTransformer(nn.Module):
    """nn.Transformer, tokens first, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Transformer(C, H, 2, 2, 32)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.core(source.transpose(0, 1), target.transpose(0, 1), tgt_mask=mask).transpose(0, 1)


class Twins(nn.Module):
    """One tower on two inputs; the cosine of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.cosine_similarity(self.encode(left), self.encode(right))


class Contrast(nn.Module):
    """Similarities of all images with all texts of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.ModuleList(Block(C, H) for _ in range(2)), nn.ModuleList(Block(C, H) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for block in self.image:
            image = block(image)
        for block in self.text:
            text = block(text)
        return F.normalize(image.mean(1), dim=-1) @ F.normalize(text.mean(1), dim=-1).T


class Recurrent(nn.Module):
    """An LSTM over what attention made of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.cell, self.head = Block(C, H), nn.LSTM(C, C, batch_first=True), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.block(x))[0][:, -1])


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T v): no softmax, no matrix of tokens by tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.feed = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C), FeedForward(C)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        mixed = query @ (key.transpose(-1, -2) @ value) / (query * key.sum(2, keepdim=True)).sum(-1, keepdim=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return (x + self.feed(x)).mean(1)


class Parts(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Nested(nn.Module):
    """Returns a tuple inside of a named tuple, with every hidden state pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(C, H) for _ in range(2)), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Parts:
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x.mean(1))
        return Parts(self.head(x[:, 0]), tuple(hidden))


class LateToken(nn.Module):
    """The class token stands last."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.blocks, self.head = (
            nn.Parameter(torch.randn(1, 1, C)),
            nn.ModuleList(Block(C, H) for _ in range(2)),
            nn.Linear(C, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.token.expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


class ClassAttention(nn.Module):
    """Patches first; the class token joins for the last layers and alone reads them, as in CaiT."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.token = nn.ModuleList(Block(C, H) for _ in range(2)), nn.Parameter(torch.randn(1, 1, C))
        self.norm, self.look, self.feed, self.head = nn.LayerNorm(C), Attention(C, H), FeedForward(C), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        token = self.token.expand(x.shape[0], -1, -1)
        joined = self.norm(torch.cat([token, x], 1))
        token = token + self.look(joined[:, :1], joined)
        return self.head((token + self.feed(token))[:, 0])


class TopTokens(nn.Module):
    """The four tokens of the highest score are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.score, self.head = nn.ModuleList(Block(C, H) for _ in range(2)), nn.Linear(C, 1), nn.Linear(4 * C, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        best = self.score(x)[..., 0].topk(4, -1).indices
        return self.head(x.gather(1, best[..., None].expand(-1, -1, C)).flatten(1))


class AxialVideo(nn.Module):
    """Attention over the places of each frame, then over the frames of each place; frames: f32[B, 4, 12, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.ModuleList(Block(C, H) for _ in range(2)), nn.ModuleList(Block(C, H) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for space, time in zip(self.space, self.time, strict=True):
            batch, frames, places, width = x.shape
            x = space(x.reshape(batch * frames, places, width)).reshape(batch, frames, places, width).transpose(1, 2)
            x = time(x.reshape(batch * places, frames, width)).reshape(batch, places, frames, width).transpose(1, 2)
        return x.mean((1, 2))


class Experts(nn.Module):
    """Soft mixture of two feed-forward experts."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.route, self.experts = Block(C, H), nn.Linear(C, 2), nn.ModuleList(FeedForward(C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        weights = self.route(x).softmax(-1)
        return (x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))).mean(1)


class Conformer(nn.Module):
    """Half feed-forward, attention, a depthwise convolution over time, half feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.block = FeedForward(C), FeedForward(C), Block(C, H)
        self.gate, self.slide, self.norm = nn.Conv1d(C, 2 * C, 1), nn.Conv1d(C, C, 5, padding=2, groups=C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x + 0.5 * self.first(x))
        y = self.norm(self.slide(F.glu(self.gate(x.transpose(1, 2)), 1)))
        x = x + F.silu(y).transpose(1, 2)
        return (x + 0.5 * self.last(x)).mean(1)


class Unbatched(nn.Module):
    """x: [T, C], without a batch: each row of the input is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x[None]
        for block in self.blocks:
            y = block(y)
        return y[0].mean(0)


def _tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, T, C),)


def _padded(batch: int) -> tuple[Tensor, ...]:
    padding = torch.zeros(batch, T, dtype=torch.bool)
    padding[0, -6:] = True
    return (torch.randn(batch, T, C), padding)


def _two(second: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, T, C), torch.randn(batch, second, C))


_ENTRIES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "diffusion transformer": (DiffusionTransformer, lambda batch: (torch.randn(batch, 4, 12, 12), torch.rand(batch))),
    "convolutions and attention": (ConvAttention, lambda batch: (torch.randn(batch, 3, SIDE, SIDE), torch.randn(batch, 7, 8))),
    "long skips": (LongSkips, _tokens),
    "resampler": (Resampler, _tokens),
    "vision and language": (VisionLanguage, lambda batch: (torch.randn(batch, T, C), torch.randint(0, VOCABULARY, (batch, 7)))),
    "alibi": (Alibi, _tokens),
    "gated pooling": (MultipleInstances, _tokens),
    "torch encoder, post-norm": (TorchEncoder, _padded),
    "torch encoder, pre-norm": (lambda: TorchEncoder(True), _padded),
    "torch transformer": (TorchTransformer, _two(9)),
    "twins": (Twins, _two(T)),
    "contrast": (Contrast, _two(20)),
    "recurrent": (Recurrent, _tokens),
    "linear attention": (LinearAttention, _tokens),
    "nested outputs": (Nested, _tokens),
    "late class token": (LateToken, _tokens),
    "class attention": (ClassAttention, _tokens),
    "top tokens": (TopTokens, _tokens),
    "axial video": (AxialVideo, lambda batch: (torch.randn(batch, 4, 12, C),)),
    "frames of an encoder": (
        lambda: FrameEncoder("mean of classes", sides=(SIDE, SIDE)),
        lambda batch: (torch.randn(batch, 4, 3, 2 * SIDE, 2 * SIDE),),
    ),
    "experts": (Experts, _tokens),
    "conformer": (Conformer, _tokens),
    "no batch": (Unbatched, lambda batch: (torch.randn(T, C),)),
}
NAMES = tuple(_ENTRIES)


def make(name: str, batch: int = 2) -> tuple[nn.Module, tuple[Any, ...]]:
    """One model, with its inputs."""
    return _ENTRIES[name][0](), _ENTRIES[name][1](batch)
