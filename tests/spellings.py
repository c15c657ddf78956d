"""Attention in many spellings: a generator of combinations, a list written by hand, and near misses.

Every spelling is a small module of plain torch. In the generated ones query, key and value come as T[B, S, H, D] (key and value with fewer
heads where they are repeated) with a padding mask bool[B, S], True for tokens that are real.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, H, D = 2, 6, 4, 8
WINDOW = 2
LOW = -1e9

SCALES = ("none", "query", "key", "both", "scores_mul", "scores_div", "tensor")
MASKS = (
    "none", "causal_added", "causal_filled", "causal_where", "padding_added", "padding_filled", "added_left", "window", "bias",
)  # fmt: skip
LAYOUTS = ("bhsd", "bshd", "flat_bmm", "baddbmm", "einsum")
KEY_HEADS = ("equal", "repeat_interleave", "expand")
CASTS = ("none", "narrow", "by_hand")


@dataclass(frozen=True)
class Spelling:
    """One combination; each field is one of the tuples above."""

    scale: str
    mask: str
    layout: str
    key_heads: str
    casts: str

    @property
    def name(self) -> str:
        return "-".join((self.scale, self.mask, self.layout, self.key_heads, self.casts))

    @property
    def is_valid(self) -> bool:
        """baddbmm is a spelling of an added mask."""
        return self.layout != "baddbmm" or self.mask in ("causal_added", "padding_added", "added_left", "bias")


def all_spellings() -> Iterator[Spelling]:
    """Every valid combination."""
    for fields in itertools.product(SCALES, MASKS, LAYOUTS, KEY_HEADS, CASTS):
        spelling = Spelling(*fields)
        if spelling.is_valid:
            yield spelling


def chosen_spellings(count: int = 360, seed: int = 0) -> list[Spelling]:
    """This many combinations: first such that every pair of values occurs, then at random; the same for the same seed."""
    pool = list(all_spellings())
    random.Random(seed).shuffle(pool)
    seen: set[tuple[tuple[int, str], tuple[int, str]]] = set()
    first, rest = [], []
    for spelling in pool:
        values = list(enumerate((spelling.scale, spelling.mask, spelling.layout, spelling.key_heads, spelling.casts)))
        pairs = set(itertools.combinations(values, 2))
        (rest if pairs <= seen else first).append(spelling)
        seen |= pairs
    return [*first, *rest][:count]


class Generated(nn.Module):
    """The attention that a spelling describes. casts=False leaves the casts out, for a reference without their rounding."""

    def __init__(self, spelling: Spelling, *, casts: bool = True) -> None:
        super().__init__()
        self.spelling, self.casts = spelling, spelling.casts if casts or spelling.casts == "by_hand" else "none"
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("bias", torch.randn(1, H, T, T, generator=generator, dtype=torch.float64))
        self.register_buffer("divisor", torch.tensor(math.sqrt(D), dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        query, key = self.scaled(query, key)
        key, value = self.repeated(key), self.repeated(value)
        if self.spelling.layout == "einsum":
            scores = self.scaled_scores(torch.einsum("bihd,bjhd->bhij", query, key))
            return torch.einsum("bhij,bjhd->bihd", self.softmax(self.masked(scores, keep)), value)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.spelling.layout in ("flat_bmm", "baddbmm"):
            return self.flat(query, key, value, keep)
        if self.spelling.layout == "bshd":
            query, key = query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1)  # T[B, S, H, D] and T[B, S, D, H]
            scores = torch.matmul(query.transpose(1, 2), key.permute(0, 3, 2, 1))
        else:
            scores = query @ key.transpose(-1, -2)
        weights = self.softmax(self.masked(self.scaled_scores(scores), keep))
        return (weights @ value).transpose(1, 2)

    def flat(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        """T[B*H, S, D] with bmm, or baddbmm for the mask."""
        query, key, value = (x.reshape(B * H, T, D) for x in (query, key, value))
        if self.spelling.layout == "baddbmm":
            mask = self.added_mask(keep).expand(B, H, T, T).reshape(B * H, T, T)
            alpha = 1 / math.sqrt(D) if self.spelling.scale in ("scores_mul", "scores_div", "tensor") else 1.0
            scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=alpha)
        else:
            scores = self.scaled_scores(torch.bmm(query, key.transpose(1, 2))).view(B, H, T, T)
            scores = self.masked(scores, keep).view(B * H, T, T)
        return torch.bmm(self.softmax(scores), value).view(B, H, T, D).transpose(1, 2)

    # scale

    def scaled(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        place = self.spelling.scale
        if place == "query":
            return query * D**-0.5, key
        if place == "key":
            return query, key / math.sqrt(D)
        if place == "both":
            return query * D**-0.25, key * D**-0.25
        return query, key

    def scaled_scores(self, scores: Tensor) -> Tensor:
        place = self.spelling.scale
        if place == "scores_mul":
            return scores * (1 / math.sqrt(D))
        if place == "scores_div":
            return scores / math.sqrt(D)
        return scores / self.divisor if place == "tensor" else scores

    # heads

    def repeated(self, x: Tensor) -> Tensor:
        """T[B, S, Hk, D] -> T[B, S, H, D]."""
        repeats = H // x.shape[2]
        if self.spelling.key_heads == "repeat_interleave":
            return x.repeat_interleave(repeats, dim=2)
        if self.spelling.key_heads == "expand":
            return x[:, :, :, None, :].expand(B, T, H // repeats, repeats, D).reshape(B, T, H, D)
        return x

    # masks

    def added_mask(self, keep: Tensor) -> Tensor:
        if self.spelling.mask == "bias":
            return self.bias
        if self.spelling.mask in ("padding_added",):
            return (1.0 - keep[:, None, None, :].to(self.bias.dtype)) * LOW
        return torch.full((T, T), float("-inf"), dtype=self.bias.dtype).triu(1)

    def masked(self, scores: Tensor, keep: Tensor) -> Tensor:
        mask = self.spelling.mask
        lower = torch.ones(T, T, dtype=torch.bool).tril()
        if mask in ("causal_added", "padding_added", "bias"):
            return scores + self.added_mask(keep)
        if mask == "added_left":
            return self.added_mask(keep) + scores
        if mask == "causal_filled":
            return scores.masked_fill(~lower, float("-inf"))
        if mask == "causal_where":
            return torch.where(lower, scores, torch.finfo(scores.dtype).min)
        if mask == "padding_filled":
            return scores.masked_fill(~keep[:, None, None, :], LOW)
        if mask == "window":
            distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
            return scores.masked_fill(distance.abs() > WINDOW, float("-inf"))
        return scores

    # softmax

    def softmax(self, scores: Tensor) -> Tensor:
        if self.casts == "narrow":
            return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        if self.casts == "by_hand":
            powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
            return powers / powers.sum(dim=-1, keepdim=True)
        return torch.softmax(scores, dim=-1)


def generated_inputs(spelling: Spelling, seed: int = 0) -> tuple[Tensor, ...]:
    """query, key, value in float64 and a padding mask of which one row keeps few tokens and, with finite masks, one keeps none."""
    generator = torch.Generator().manual_seed(seed)
    heads = H if spelling.key_heads == "equal" else H // 2
    query = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64) for _ in range(2))
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, T - 2 :] = False
    keep[-1, :] = seed % 2 == 0
    return query, key, value, keep


# written by hand


@dataclass(frozen=True)
class Case:
    """A module with its inputs. dynamic: torch.export's dynamic_shapes, or None."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic: object = None


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value)


C = 1 / math.sqrt(D)


def lower() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def by_hand(scores: Tensor) -> Tensor:
    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return powers / powers.sum(-1, keepdim=True)


def flat_heads(x: Tensor) -> Tensor:
    return x.reshape(B * H, T, D)


def repeat_heads(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, H // 2, 2, T, D).reshape(B, H, T, D)


# query, key, value: T[B, H, T, D]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "divided by sqrt(d)": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v,
    "multiplied by a number": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * C, -1) @ v,
    "scale on the query": lambda q, k, v: torch.softmax((q * C) @ k.transpose(-1, -2), -1) @ v,
    "scale on the key": lambda q, k, v: torch.softmax(q @ (k * C).transpose(-1, -2), -1) @ v,
    "root of the scale on both": lambda q, k, v: torch.softmax((q * C**0.5) @ (k * C**0.5).transpose(-1, -2), -1) @ v,
    "no scale": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
    "divided, then mask added": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D) + added(q), -1) @ v,
    "multiplied, then mask added": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * C + added(q), -1) @ v,
    "mask on the left of the plus": lambda q, k, v: torch.softmax(added(q) + (q @ k.transpose(-1, -2)) * C, -1) @ v,
    "mask added, then scaled": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2) + added(q)) * C, -1) @ v,
    "causal by masked_fill": lambda q, k, v: torch.softmax((q @ k.mT * C).masked_fill(~lower(), float("-inf")), -1) @ v,
    "causal by masked_fill with -1e9": lambda q, k, v: torch.softmax((q @ k.mT * C).masked_fill(lower() == 0, LOW), -1) @ v,
    "causal by where": lambda q, k, v: torch.softmax(torch.where(lower(), q @ k.mT * C, torch.finfo(q.dtype).min), -1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * C, -1), v),
    "bmm over B*H": lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(flat_heads(q), flat_heads(k).mT) * C, -1), flat_heads(v)),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.softmax(torch.baddbmm(added(q).expand(B * H, T, T), flat_heads(q), flat_heads(k).mT, alpha=C), -1), flat_heads(v)
    ),
    "permuted key": lambda q, k, v: torch.softmax(q.permute(0, 1, 2, 3) @ k.permute(0, 1, 3, 2) * C, -1) @ v,
    "softmax in another float type": lambda q, k, v: torch.softmax(q @ k.mT * C, -1, dtype=torch.float64).to(q.dtype) @ v,
    "softmax by hand": lambda q, k, v: by_hand(q @ k.mT * C) @ v,
    "softmax by hand, causal": lambda q, k, v: by_hand((q @ k.mT * C).masked_fill(~lower(), float("-inf"))) @ v,
    "exp of log_softmax": lambda q, k, v: torch.log_softmax(q @ k.mT * C, -1).exp() @ v,
    "soft-cap": lambda q, k, v: torch.softmax(20.0 * torch.tanh(q @ k.mT * C / 20.0), -1) @ v,
    "soft-cap, causal": lambda q, k, v: torch.softmax(5.0 * torch.tanh(q @ k.mT * C / 5.0) + added(q), -1) @ v,
    "keys times queries": lambda q, k, v: (v.mT @ torch.softmax(k @ q.mT * C, -2)).mT,
    "output scaled": lambda q, k, v: (torch.softmax(q @ k.mT * C, -1) @ v) * 0.5,
    "output transposed": lambda q, k, v: (torch.softmax(q @ k.mT * C, -1) @ v).transpose(1, 2).reshape(B, T, H * D),
    "dropout in eval": lambda q, k, v: F.dropout(torch.softmax(q @ k.mT * C, -1), 0.1, training=False) @ v,
    "repeat_interleave": lambda q, k, v: torch.softmax(q @ k[:, ::2].repeat_interleave(2, 1).mT * C, -1) @ v[:, ::2].repeat_interleave(2, 1),
    "expanded heads": lambda q, k, v: torch.softmax(q @ repeat_heads(k[:, :2]).mT * C, -1) @ repeat_heads(v[:, :2]),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sdpa, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    "sdpa, mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=lower()),
    "sdpa, grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "weights cleaned of NaN": lambda q, k, v: torch.nan_to_num(torch.softmax(q @ k.mT * C + added(q), -1)) @ v,
    "three dimensions": lambda q, k, v: torch.softmax(q[:, 0] @ k[:, 0].mT * C, -1) @ v[:, 0],
    "two dimensions": lambda q, k, v: torch.softmax(torch.mm(q[0, 0], k[0, 0].t()) * C, -1).mm(v[0, 0]),
    "one query": lambda q, k, v: torch.softmax(q[:, :, -1:] @ k.mT * C, -1) @ v,
    "keys without a batch": lambda q, k, v: torch.softmax(q @ k[0].mT * C, -1) @ v[0],
    "queries without a batch": lambda q, k, v: torch.softmax(q[0] @ k.mT * C, -1) @ v,
    "one key head for all": lambda q, k, v: torch.softmax(q @ k[:, :1].mT * C, -1) @ v[:, :1],
    "temperature per head": lambda q, k, v: torch.softmax((q @ k.mT) * torch.linspace(0.1, 0.4, H, dtype=q.dtype)[:, None, None], -1) @ v,
}  # fmt: skip


def added(x: Tensor) -> Tensor:
    return torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)


class Packed(nn.Module):
    """One projection to query, key and value, cut apart in one of several ways. x: T[B, T, H*D]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.project = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        packed = self.project(x)
        if self.how == "unbind":
            query, key, value = packed.view(batch, tokens, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            if self.how == "chunk":
                parts = packed.chunk(3, dim=-1)
            elif self.how == "split":
                parts = packed.split(width, dim=-1)
            else:
                parts = tuple(packed[..., i * width : (i + 1) * width] for i in range(3))
            query, key, value = (part.view(batch, tokens, H, D).transpose(1, 2) for part in parts)
        weights = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(D), dim=-1)
        return (weights @ value).transpose(1, 2).reshape(batch, tokens, width)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, whose weights nobody reads."""

    def __init__(self, *, batch_first: bool, need_weights: bool, masked: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(H * D, H, batch_first=batch_first)
        self.need_weights, self.masked = need_weights, masked

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).triu(1) if self.masked else None
        padding = hidden if self.masked else None
        return self.attention(x, x, x, need_weights=self.need_weights, attn_mask=mask, key_padding_mask=padding)[0]


class Block(nn.Module):
    """A whole post-norm block with three projections, as encoders write it. x: T[B, T, H*D]; keep: i64[B, T], 1 for real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.project = (nn.Linear(H * D, H * D) for _ in range(4))
        self.norm = nn.LayerNorm(H * D)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], H, D).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        scores = self.heads(self.query(x)) @ self.heads(self.key(x)).transpose(-1, -2) / math.sqrt(D) + mask
        mixed = (torch.softmax(scores, dim=-1) @ self.heads(self.value(x))).permute(0, 2, 1, 3).contiguous().view(x.shape)
        return self.norm(self.project(mixed) + x)


class DynamicCausal(nn.Module):
    """Batch and length are known only at run time. x: T[b, t, H*D]; keep: bool[b, t]."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.project = nn.Linear(H * D, 3 * H * D)
        self.causal = causal

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = (part.view(batch, tokens, H, D).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) * C
        seen = keep[:, None, None, :]
        if self.causal:
            place = torch.arange(tokens)
            seen = seen & (place[None, :] <= place[:, None])
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        return (weights @ value).transpose(1, 2).reshape(batch, tokens, width)


def handwritten() -> dict[str, Case]:
    """Spellings by name; float64, seeded."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(3))
    cases = {name: Case(Plain(function), tensors) for name, function in FUNCTIONS.items()}
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[0, T - 1 :] = True
    for how in ("chunk", "split", "unbind", "slices"):
        cases[f"packed projection cut by {how}"] = Case(Packed(how).double().eval(), (x,))
    for batch_first, need_weights in itertools.product((True, False), (True, False)):
        name = f"nn.MultiheadAttention, batch_first={batch_first}, need_weights={need_weights}"
        module = TorchAttention(batch_first=batch_first, need_weights=need_weights).double().eval()
        cases[name] = Case(module, (x if batch_first else x.transpose(0, 1).contiguous(), hidden))
    masked = TorchAttention(batch_first=True, need_weights=False, masked=True).double().eval()
    cases["nn.MultiheadAttention, causal and padding"] = Case(masked, (x, hidden))
    cases["block with padding, as encoders write it"] = Case(Block().double().eval(), (x, (~hidden).long()))
    batch, tokens = torch.export.Dim("b", max=64), torch.export.Dim("t", max=512)
    module = Packed("chunk").double().eval()
    cases["dynamic batch"] = Case(module, (x,), ({0: batch},))
    for causal, name in ((False, "dynamic batch and length, padding"), (True, "dynamic batch and length, causal and padding")):
        module = DynamicCausal(causal=causal).double().eval()
        cases[name] = Case(module, (x, ~hidden), ({0: batch, 1: tokens}, {0: batch, 1: tokens}))
    return cases
