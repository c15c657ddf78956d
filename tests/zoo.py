"""Small plain-torch models of every layout that the analyses must understand, seeded and in eval mode.

`zoo(T, C, H, B)` gives each model with its inputs; T is the number of tokens that its attention sees (class tokens included), C the width,
H the heads, B the batch, so that T = C, T = B and T = H exist. H must divide C and be even, T be even and at least 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Entry = tuple[nn.Module, tuple[Tensor, ...]]
VOCABULARY, CLASSES = 31, 5


class RMSNorm(nn.Module):
    """Spelled out, as in most decoder models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; x: T[B, H, T, D]; cos, sin: T[T, D]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    """Self- or cross-attention. x: T[B, T, C]; memory: T[B, S, C]; mask: added to the scores; rotary: cos and sin."""

    def __init__(
        self, C: int, H: int, *, kv_heads: int | None = None, causal: bool = False, packed: bool = False, spelled: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = H, kv_heads or H, C // H
        self.causal, self.packed, self.spelled = causal, packed, spelled
        if packed:
            self.qkv = nn.Linear(C, 3 * C)
        else:
            self.query = nn.Linear(C, C)
            self.key, self.value = nn.Linear(C, self.kv_heads * self.head_width), nn.Linear(C, self.kv_heads * self.head_width)
        self.project = nn.Linear(C, C)

    def project_in(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        if self.packed:
            query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4).unbind(0)
            return query, key, value
        query = self.query(x).view(batch, tokens, self.heads, self.head_width).transpose(1, 2)
        key = self.key(memory).view(batch, memory.shape[1], self.kv_heads, self.head_width).transpose(1, 2)
        value = self.value(memory).view(batch, memory.shape[1], self.kv_heads, self.head_width).transpose(1, 2)
        return query, key, value

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        query, key, value = self.project_in(x, x if memory is None else memory)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.kv_heads != self.heads:
            batch, _, tokens, width = key.shape
            repeats = self.heads // self.kv_heads
            key, value = (
                t[:, :, None].expand(batch, self.kv_heads, repeats, tokens, width).reshape(batch, self.heads, tokens, width)
                for t in (key, value)
            )
        if self.spelled:
            scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_width)
            mixed = torch.softmax(scores if mask is None else scores + mask, -1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        return self.project(mixed.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(F.gelu(self.grow(x)))


class SwiGLU(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(C, 2 * C, bias=False), nn.Linear(C, 2 * C, bias=False), nn.Linear(2 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer. layout: "pre", "post", "sandwich", "parallel" or "scaled" (pre-norm with LayerScale)."""

    def __init__(self, C: int, H: int, *, layout: str = "pre", gated: bool = False, rms: bool = False, **attention: object) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = RMSNorm if rms else nn.LayerNorm
        self.layout = layout
        self.norms = nn.ModuleList(norm(C) for _ in range({"sandwich": 4, "parallel": 1}.get(layout, 2)))
        self.mix, self.feed = Attention(C, H, **attention), (SwiGLU if gated else FeedForward)(C)  # type: ignore[arg-type]
        if layout == "scaled":
            self.scale_mix, self.scale_feed = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        def mix(y: Tensor) -> Tensor:
            return self.mix(y, None, mask, rotary)

        norms = self.norms
        if self.layout == "post":
            x = norms[0](x + mix(x))
            return norms[1](x + self.feed(x))
        if self.layout == "sandwich":
            x = x + norms[1](mix(norms[0](x)))
            return x + norms[3](self.feed(norms[2](x)))
        if self.layout == "parallel":
            normed = norms[0](x)
            return x + mix(normed) + self.feed(normed)
        if self.layout == "scaled":
            x = x + self.scale_mix * mix(norms[0](x))
            return x + self.scale_feed * self.feed(norms[1](x))
        x = x + mix(norms[0](x))
        return x + self.feed(norms[1](x))


class ViT(nn.Module):
    """images: f32[B, 3, 2, 2 * patches] -> logits. special: number of tokens before the patches (class, registers, distillation)."""

    def __init__(self, T: int, C: int, H: int, *, special: int = 1, read: str = "class", layout: str = "pre", depth: int = 2) -> None:
        super().__init__()
        self.special_count, self.read = special, read
        self.patch = nn.Conv2d(3, C, 2, stride=2)
        self.special = nn.Parameter(torch.randn(1, special, C)) if special else None
        self.position = nn.Parameter(torch.randn(1, T, C))
        self.blocks = nn.ModuleList(Block(C, H, layout=layout, packed=True) for _ in range(depth))
        self.norm, self.head, self.second_head = nn.LayerNorm(C), nn.Linear(C, CLASSES), nn.Linear(C, CLASSES)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.patch(images).flatten(2).transpose(1, 2)
        if self.special is not None:
            x = torch.cat([self.special.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.read == "class":
            return self.head(x[:, 0])
        if self.read == "two":
            return self.head(x[:, 0]), self.second_head(x[:, self.special_count - 1])
        return self.head(x.mean(1)) if self.read == "mean" else self.head(x)


class Bert(nn.Module):
    """Post-norm encoder with padding. ids: i64[B, T]; seen: i64[B, T], 0 at padding -> logits from the first token."""

    def __init__(self, T: int, C: int, H: int, spelled: bool = False) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(VOCABULARY, C), nn.Embedding(T, C)
        self.register_buffer("position_ids", torch.arange(T)[None])
        self.norm = nn.LayerNorm(C)
        self.blocks = nn.ModuleList(Block(C, H, layout="post", spelled=spelled) for _ in range(2))
        self.pool, self.head = nn.Linear(C, C), nn.Linear(C, CLASSES)

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.position(self.position_ids[:, : ids.shape[1]]))
        mask = (1.0 - seen[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, mask)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class Decoder(nn.Module):
    """Causal language model. ids: i64[B, T] -> logits f32[B, T, V]. rotary: positions by rotation instead of a table."""

    def __init__(self, T: int, C: int, H: int, *, rotary: bool = False, **block: object) -> None:
        super().__init__()
        self.word, self.rotary = nn.Embedding(VOCABULARY, C), rotary
        if rotary:
            width = C // H
            steps = 1.0 / 100.0 ** (torch.arange(0, width, 2) / width)
            self.register_buffer("steps", steps)
        else:
            self.position = nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, H, causal=True, **block) for _ in range(2))  # type: ignore[arg-type]
        self.norm, self.head = RMSNorm(C), nn.Linear(C, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, places, rotary = self.word(ids), torch.arange(ids.shape[1]), None
        if self.rotary:
            angles = torch.cat([places[:, None] * self.steps, places[:, None] * self.steps], -1)
            rotary = angles.cos(), angles.sin()
        else:
            x = x + self.position(places)
        for block in self.blocks:
            x = block(x, None, rotary)
        return self.head(self.norm(x))


class Whisper(nn.Module):
    """Speech encoder. spectrum: f32[B, 8, 2 * T] -> f32[B, T, C]: two convolutions, sinusoids, pre-norm blocks."""

    def __init__(self, T: int, C: int, H: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, C, 3, padding=1), nn.Conv1d(C, C, 3, stride=2, padding=1)
        self.register_buffer("position", torch.randn(T, C))
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))
        self.norm = nn.LayerNorm(C)

    def forward(self, spectrum: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(spectrum)))).permute(0, 2, 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CrossBlock(nn.Module):
    """Decoder layer: causal self-attention, cross-attention to memory, feed-forward; all pre-norm."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.mix, self.look, self.feed = Attention(C, H, causal=True), Attention(C, H), FeedForward(C)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x))
        x = x + self.look(self.norms[1](x), memory)
        return x + self.feed(self.norms[2](x))


class EncoderDecoder(nn.Module):
    """spectrum: f32[B, 8, 2 * T], ids: i64[B, S] -> logits f32[B, S, V]."""

    def __init__(self, T: int, C: int, H: int, S: int) -> None:
        super().__init__()
        self.encoder = Whisper(T, C, H)
        self.word, self.position = nn.Embedding(VOCABULARY, C), nn.Parameter(torch.randn(S, C))
        self.blocks = nn.ModuleList(CrossBlock(C, H) for _ in range(2))
        self.norm = nn.LayerNorm(C)

    def forward(self, spectrum: Tensor, ids: Tensor) -> Tensor:
        memory, x = self.encoder(spectrum), self.word(ids) + self.position
        for block in self.blocks:
            x = block(x, memory)
        return self.norm(x) @ self.word.weight.T


class MixerBlock(nn.Module):
    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.norms, self.tokens, self.channels = nn.ModuleList(nn.LayerNorm(C) for _ in range(2)), FeedForward(T), FeedForward(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    """images: f32[B, 3, 2, 2 * T] -> logits: tokens are mixed by a linear over them."""

    def __init__(self, T: int, C: int) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, C, 2, stride=2), nn.Linear(C, CLASSES)
        self.blocks = nn.Sequential(*(MixerBlock(T, C) for _ in range(2)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(images).flatten(2).transpose(1, 2)).mean(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.depthwise, self.norm, self.feed = nn.Conv2d(C, C, 3, padding=1, groups=C), nn.LayerNorm(C), FeedForward(C)
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.feed(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (y * self.scale).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """images: f32[B, 3, 8, 8] -> logits: two stages of residual convolution blocks."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, C, 2, stride=2), nn.Sequential(*(ConvNeXtBlock(C) for _ in range(2)))
        self.down, self.second = nn.Conv2d(C, 2 * C, 2, stride=2), nn.Sequential(*(ConvNeXtBlock(2 * C) for _ in range(2)))
        self.head = nn.Linear(2 * C, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.down(self.first(self.stem(images)))).mean((2, 3)))


class SwinBlock(nn.Module):
    """Attention inside windows of height x width tokens, rolled by half a window where shifted, with a bias per pair of places."""

    def __init__(self, height: int, width: int, C: int, H: int, shifted: bool) -> None:
        super().__init__()
        self.window, self.shift = (height, width), (height // 2, width // 2) if shifted else (0, 0)
        self.norms, self.mix, self.feed = (
            nn.ModuleList(nn.LayerNorm(C) for _ in range(2)),
            Attention(C, H, packed=True, spelled=True),
            FeedForward(C),
        )
        self.bias = nn.Parameter(torch.randn(H, height * width, height * width))

    def forward(self, x: Tensor) -> Tensor:
        (batch, rows, columns, C), (height, width) = x.shape, self.window
        y = self.norms[0](x)
        if any(self.shift):
            y = torch.roll(y, (-self.shift[0], -self.shift[1]), (1, 2))
        y = y.view(batch, rows // height, height, columns // width, width, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, C)
        y = self.mix(y, None, self.bias)
        y = y.view(batch, rows // height, columns // width, height, width, C).permute(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, C)
        if any(self.shift):
            y = torch.roll(y, self.shift, (1, 2))
        x = x + y
        return x + self.feed(self.norms[1](x))


class Swin(nn.Module):
    """images: f32[B, 3, 4, T] -> logits: windows of 2 x T/2 tokens on a grid of 4 x T."""

    def __init__(self, T: int, C: int, H: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, C, 1), nn.Linear(C, CLASSES)
        self.blocks = nn.Sequential(*(SwinBlock(2, T // 2, C, H, shifted) for shifted in (False, True)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).permute(0, 2, 3, 1)).mean((1, 2)))


def _entries(T: int, C: int, H: int, B: int) -> dict[str, Callable[[], Entry]]:
    def images(patches: int) -> tuple[Tensor, ...]:
        return (torch.randn(B, 3, 2, 2 * patches),)

    def ids(length: int = T) -> Tensor:
        return torch.randint(0, VOCABULARY, (B, length))

    def seen() -> Tensor:
        return (torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1))).long()

    return {
        "vit_class": lambda: (ViT(T, C, H), images(T - 1)),
        "vit_mean": lambda: (ViT(T, C, H, special=0, read="mean"), images(T)),
        "vit_registers": lambda: (ViT(T, C, H, special=4, read="two"), images(T - 4)),
        "vit_dense": lambda: (ViT(T, C, H, special=0, read="dense"), images(T)),
        "layer_scale": lambda: (ViT(T, C, H, layout="scaled"), images(T - 1)),
        "bert": lambda: (Bert(T, C, H), (ids(), seen())),
        "bert_spelled": lambda: (Bert(T, C, H, spelled=True), (ids(), seen())),
        "gpt": lambda: (Decoder(T, C, H, packed=True), (ids(),)),
        "llama": lambda: (Decoder(T, C, H, rotary=True, gated=True, rms=True, kv_heads=H // 2), (ids(),)),
        "parallel": lambda: (Decoder(T, C, H, rotary=True, layout="parallel"), (ids(),)),
        "sandwich": lambda: (Decoder(T, C, H, rotary=True, layout="sandwich", gated=True, rms=True), (ids(),)),
        "whisper": lambda: (Whisper(T, C, H), (torch.randn(B, 8, 2 * T),)),
        "encoder_decoder": lambda: (EncoderDecoder(T, C, H, T - 2), (torch.randn(B, 8, 2 * T), ids(T - 2))),
        "mixer": lambda: (Mixer(T, C), images(T)),
        "convnext": lambda: (ConvNeXt(C), (torch.randn(B, 3, 8, 8),)),
        "swin": lambda: (Swin(T, C, H), (torch.randn(B, 3, 4, T),)),
    }


NAMES = tuple(_entries(10, 24, 4, 3))


def make(name: str, T: int = 10, C: int = 24, H: int = 4, B: int = 3) -> Entry:
    """One model of the zoo, with its inputs."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model, inputs = _entries(T, C, H, B)[name]()
    torch.set_rng_state(state)
    return model.eval(), inputs


def zoo(T: int = 10, C: int = 24, H: int = 4, B: int = 3) -> dict[str, Entry]:
    """Every model of the zoo, by name, with the inputs to call it with."""
    return {name: make(name, T, C, H, B) for name in NAMES}
