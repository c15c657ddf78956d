"""Image encoders that read the frames of a video one by one: what stands around the encoder says that its batch is samples x frames.

video: T[B, F, 3, 2 * rows, 2 * columns], patches of 2 x 2, behind a class token where one is read -> what `read` makes of all frames' tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Block

C, H, FRAMES, SAMPLES = 8, 2, 4, 2
Read = Callable[["FrameEncoder", Tensor, int], Tensor | tuple[Tensor, ...]]


def per_frame(x: Tensor, samples: int) -> Tensor:
    """[B * F, ...] as [B, F, ...]."""
    return x.reshape(samples, -1, *x.shape[1:])


def flow(model: FrameEncoder, x: Tensor, samples: int) -> Tensor:
    """A convolution over the frames of the class tokens."""
    return model.slide(per_frame(x[:, 0], samples).transpose(1, 2)).mean(2)


def watch(model: FrameEncoder, x: Tensor, samples: int) -> Tensor:
    """Attention from frame to frame, with a position for each."""
    rows = per_frame(x[:, 0], samples) + model.time
    return model.temporal(rows).mean(1)


def volume(model: FrameEncoder, x: Tensor, samples: int) -> Tensor:
    """A convolution over frames and patches of all tokens."""
    grid = per_frame(x, samples).reshape(samples, -1, *model.sides, C).permute(0, 4, 1, 2, 3)
    return model.solid(grid).mean((2, 3, 4))


READS: dict[str, Read] = {
    "mean of means": lambda model, x, samples: model.head(per_frame(x.mean(1), samples).mean(1)),
    "mean of all": lambda model, x, samples: per_frame(x, samples).mean((1, 2)),
    "mean of directions": lambda model, x, samples: per_frame(F.normalize(model.head(x.mean(1)), dim=-1), samples).mean(1),
    "largest of means": lambda model, x, samples: per_frame(x.mean(1), samples).amax(1),
    "sum of means": lambda model, x, samples: per_frame(x.mean(1), samples).sum(1),
    "mean of sums": lambda model, x, samples: per_frame(x.sum(1) / x.shape[1], samples).mean(1),
    "mean of gates": lambda model, x, samples: per_frame((x * torch.softmax(model.head(x)[..., :1], 1)).sum(1), samples).mean(1),
    "mean of squares": lambda model, x, samples: per_frame(x.mean(1) * x.mean(1), samples).mean(1),
    "mean of classes": lambda model, x, samples: per_frame(model.head(x[:, 0]), samples).mean(1),
    "classes and patches": lambda model, x, samples: per_frame(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1), samples).mean(1),
    "all tokens": lambda model, x, samples: (per_frame(x, samples), per_frame(x.mean(1), samples).mean(1)),
    "means of frames": lambda model, x, samples: (per_frame(x.mean(1), samples), per_frame(x.mean(1), samples).mean(1)),
    "flow": flow,
    "watch": watch,
    "volume": volume,
}
CLASSES = ("mean of classes", "classes and patches", "flow", "watch", "frames alone")


class FrameEncoder(nn.Module):
    """A small ViT over frames. read: of READS, or "frames alone" for logits of every frame."""

    def __init__(self, read: str = "mean of means", depth: int = 2, sides: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.sides, tokens = read, sides, sides[0] * sides[1] + (read in CLASSES)
        self.patch, self.position = nn.Conv2d(3, C, 2, stride=2), nn.Parameter(torch.randn(1, tokens, C))
        self.token = nn.Parameter(torch.randn(1, 1, C)) if read in CLASSES else None
        self.blocks, self.norm, self.head = nn.ModuleList(Block(C, H) for _ in range(depth)), nn.LayerNorm(C), nn.Linear(C, 5)
        self.slide, self.solid = nn.Conv1d(C, C, 3, padding=1), nn.Conv3d(C, C, 3, padding=1)
        self.time, self.temporal = nn.Parameter(torch.randn(FRAMES, C)), Block(C, H)

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, 2 * rows, 2 * columns] -> [N, T, C]."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, video: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.encode(video.flatten(0, 1))
        if self.read == "frames alone":
            return per_frame(self.head(x[:, 0]), video.shape[0])
        return READS[self.read](self, x, video.shape[0])


class FlatFrames(FrameEncoder):
    """The same with frames in the batch of the input, T[B * F, 3, ...]: only a view behind the encoder tells of them."""

    def forward(self, video: Tensor) -> Tensor | tuple[Tensor, ...]:
        return READS[self.read](self, self.encode(video), video.shape[0] // FRAMES)


class Deep(nn.Module):
    """x: T[B, F, T, C], with the frames in a dimension of their own everywhere but in attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for block in self.blocks:
            x = x + block.mix(block.norms[0](x).flatten(0, 1)).reshape(x.shape)
            x = x + block.feed(block.norms[1](x))
        return x, x[:, :, 0].mean(1), x.mean((1, 2))


class Chunks(nn.Module):
    """Chunks of a text, T[B, F, T, C], with seen: i64[B, F, T], 0 at padding; the mean of their first tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(C, H) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        mask = (1.0 - seen.flatten(0, 1)[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            rows = block(rows, mask)
        return per_frame(rows[:, 0], x.shape[0]).mean(1)


class Adapters(nn.Module):
    """Every layer ends in a convolution over the frames of each place; or its attention hides later tokens."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.blocks, self.slide = nn.ModuleList(Block(C, 2, causal=causal) for _ in range(2)), nn.Conv1d(C, C, 3, padding=1)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        samples, frames, tokens, width = x.shape
        for block in self.blocks:
            x = block.norms[0](x.reshape(-1, tokens, width))
            x = x + block.mix(x)
            if not self.causal:
                y = x.reshape(samples, frames, tokens, width).permute(0, 2, 3, 1).reshape(-1, width, frames)
                x = x + self.slide(y).reshape(samples, tokens, width, frames).permute(0, 3, 1, 2).reshape(x.shape)
            x = x.reshape(samples, frames, tokens, width)
        return x.mean((1, 2))


class Library(nn.Module):
    """A library's image model over frames; the mean over them of what it gives for each."""

    def __init__(self, model: nn.Module, read: str) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, video: Tensor) -> Tensor:
        found = getattr(self.model(pixel_values=video.flatten(0, 1)), self.read)
        return found.unflatten(0, video.shape[:2]).mean(1)


def video(samples: int = SAMPLES, frames: int = FRAMES, still: bool = False) -> Tensor:
    """Frames in float64; still: all those of a sample are equal."""
    x = torch.randn(samples, 1 if still else frames, 3, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.expand(-1, frames, -1, -1, -1).contiguous()
