"""What looks like attention and is not, and random chains of masks that may or may not be one."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.spellings import LOW, B, C, D, H, T, added, lower


def exponentials(query: Tensor, key: Tensor, dim: int, floor: float = 0.0) -> Tensor:
    powers = torch.exp(query @ key.mT)
    total = powers.sum(dim, keepdim=True)
    return powers / (total + floor if floor else total)


def weights_and_more(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.softmax(query @ key.mT, -1)
    return weights @ value + weights.mean(1, keepdim=True)[..., :1]


def scores_and_more(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT * C
    return torch.softmax(scores, -1) @ value + scores.sum()


# what looks like attention and is not, with a word of the sentence that says why
NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "softmax over queries": (lambda q, k, v: torch.softmax(q @ k.mT * C, -2) @ v, "another axis"),
    "softmax over heads": (lambda q, k, v: torch.softmax(q @ k.mT * C, 1) @ v, "another axis"),
    "softmax over batch": (lambda q, k, v: torch.softmax(q @ k.mT * C, 0) @ v, "another axis"),
    "scale after the softmax": (lambda q, k, v: (torch.softmax(q @ k.mT, -1) * C) @ v, "go through mul"),
    "scale after the softmax by query": (lambda q, k, v: (torch.softmax(q @ k.mT, -1) * q[..., :1]) @ v, "go through mul"),
    "scale that depends on the key": (lambda q, k, v: torch.softmax((q @ k.mT) * k[..., 0][:, :, None, :], -1) @ v, "depends on the key"),
    "fixed scale per key": (lambda q, k, v: torch.softmax((q @ k.mT) * torch.linspace(1, 2, T, dtype=q.dtype), -1) @ v, "depends on the key"),
    "scores filled with zero": (lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(~lower(), 0.0), -1) @ v, "hides no key"),
    "sum kept above zero": (lambda q, k, v: exponentials(q, k, -1, 1e-6) @ v, ""),
    "exp of other scores": (lambda q, k, v: (torch.exp(q @ k.mT) / torch.exp(k @ q.mT).sum(-1, keepdim=True)) @ v, ""),
    "sum over another axis": (lambda q, k, v: exponentials(q, k, -2) @ v, "another axis"),
    "mask within the soft-cap": (lambda q, k, v: torch.softmax(5.0 * torch.tanh((q @ k.mT + added(q)) / 5.0), -1) @ v, "soft-cap"),
    "weights used twice": (lambda q, k, v: weights_and_more(q, k, v), "are used by"),
    "weights squared": (lambda q, k, v: torch.softmax(q @ k.mT, -1).pow(2) @ v, "go through pow"),
    "weights zeroed by another mask": (lambda q, k, v: torch.softmax(q @ k.mT, -1).masked_fill(~lower(), 0.0) @ v, "set to zero"),
    "product with rows of the weights": (lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v, "another axis"),
    "scores not from a product": (lambda q, k, v: torch.softmax((q - k).abs()[..., :T], -1) @ v[:, :, :T], ""),
    "weights go through relu": (lambda q, k, v: torch.relu(torch.softmax(q @ k.mT, -1) - 0.1) @ v, "go through sub"),
    "scores used besides": (lambda q, k, v: scores_and_more(q, k, v), "also used"),
    "scores of two masks that meet in an empty row": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(v[:, :, None, :, 0] > 0, LOW) + k[:, :, None, :, 0], -1) @ v,
        "another mask hides keys too",
    ),
}  # fmt: skip


LOWS = (float("-inf"), LOW, -1e4, torch.finfo(torch.float64).min, torch.finfo(torch.float32).min, -100.0, -1e6)
SHAPES = ((1, 1, T, T), (T, T), (B, 1, 1, T), (B, H, T, T), (1, 1, 1, T))
STEPS = ("add fixed", "add given", "add both", "fill fixed", "fill given", "where both", "scale", "cap", "bias", "zero after")


class MaskChain(nn.Module):
    """One to four random steps between product and softmax; query, key, value: T[B, H, T, D]; keep: bool[B, T]; seen: bool[B, 1, T, T]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        pick = random.Random(seed)
        self.steps = [(pick.choice(STEPS), pick.choice(LOWS), pick.random() < 0.5) for _ in range(pick.randint(1, 4))]
        self.by_hand = pick.random() < 0.3
        for number in range(len(self.steps)):
            generator = torch.Generator().manual_seed(pick.randint(0, 99))
            shape = pick.choice(SHAPES)
            fixed = lower() if pick.random() < 0.5 else torch.rand(shape, generator=generator) > 0.4
            self.register_buffer(f"fixed{number}", fixed)
            self.register_buffer(f"bias{number}", torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, seen: Tensor) -> Tensor:
        scores = query @ key.mT * 0.4
        filled: Tensor | None = None
        for number, (step, low, per_key) in enumerate(self.steps):
            given = keep[:, None, None, :] if per_key else seen
            fixed = self.get_buffer(f"fixed{number}")
            if step in ("add fixed", "add given", "add both"):
                condition = {"add fixed": fixed, "add given": given, "add both": fixed & given}[step]
                scores = scores + torch.zeros((), dtype=scores.dtype).expand(condition.shape).masked_fill(~condition, low)
            elif step in ("fill fixed", "fill given"):
                filled = fixed if step == "fill fixed" else given
                scores = scores.masked_fill(~filled, low)
            elif step == "where both":
                scores = torch.where(given & fixed, scores, low)
            elif step == "scale":
                scores = scores * 1.5
            elif step == "cap":
                scores = 3.0 * torch.tanh(scores / 3.0)
            elif step == "bias":
                scores = scores + self.get_buffer(f"bias{number}")
        if self.by_hand:
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            weights = powers / powers.sum(-1, keepdim=True)
        else:
            weights = torch.softmax(scores, -1)
        if filled is not None and any(step == "zero after" for step, _, _ in self.steps):
            weights = weights.masked_fill(~filled, 0.0)
        return weights @ value


def chain_inputs(seed: int) -> tuple[Tensor, ...]:
    """Inputs with rows in which everything is hidden for two of three seeds."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(B, T, generator=generator) > 0.5
    seen = torch.rand(B, 1, T, T, generator=generator) > 0.5
    if seed % 3 == 0:
        keep[1] = False
    if seed % 3 == 1:
        keep[:], seen[:] = True, True
        seen[0, 0, 2] = False
    return query, key, value, keep, seen
