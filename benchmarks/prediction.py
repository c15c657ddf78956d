"""How well predicted seconds agree with measured ones: whole models, three batch sizes, every runtime, at f32 and bf16.

    python benchmarks/prediction.py                   # all models; writes benchmarks/results/prediction.json and .md
    python benchmarks/prediction.py --smoke           # two models, one batch size, few rounds; writes nothing

The models in HELD_BACK were named before the first run and are never used to tune a formula.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.calibrate import calibrate
from paretorch.cost_model.devices import Target
from paretorch.cost_model.measure import race
from paretorch.cost_model.price import Prices
from paretorch.ir.errors import ParetorchError
from paretorch.rewrites.normalize import normalize

RESULTS = Path(__file__).resolve().parent / "results"
BATCHES = (1, 4, 8)
CONTENDERS = (("eager", "f32"), ("eager", "bf16"), ("onnxruntime", "f32"), ("openvino", "f32"))
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


def to_half(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return module.to(torch.bfloat16), x.to(torch.bfloat16) if x.is_floating_point() else x


def rows(name: str, batch: int, prices: Prices, rounds: int) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a model on each runtime that takes it, from one race."""
    build, make = MODELS[name]
    calls, predicted = {}, {}
    for runtime, dtype in CONTENDERS:
        if RUNTIMES[runtime].refuses() is not None:
            continue
        torch.manual_seed(0)
        model, x = build().eval(), make(batch)
        if dtype == "bf16":
            model, x = to_half(model, x)
        try:
            graph = normalize(capture(model, (x,)).graph)
            execute = RUNTIMES[runtime].compile(graph, (x,))
        except ParetorchError as error:
            print(f"{name} x {batch} on {runtime} {dtype}: {error}")
            continue
        calls[f"{runtime} {dtype}"] = lambda execute=execute, x=x: execute(x)
        predicted[f"{runtime} {dtype}"] = prices.graph_cost(graph, runtime).seconds
    measured = race(calls, rounds, seed=0)
    return [
        {
            "model": name, "batch": batch, "contender": key, "predicted_s": predicted[key], "measured_s": found.seconds, "spread": found.spread,
            "error": predicted[key] / found.seconds - 1, "held back": name in HELD_BACK,
        }
        for key, found in measured.items()
    ]  # fmt: skip


def summary(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and 90th percentile of |error|, over all rows, the held-back models, and each contender."""
    groups = {"all": table, "held back": [row for row in table if row["held back"]]}
    groups |= {key: [row for row in table if row["contender"] == key] for key in sorted({row["contender"] for row in table})}
    found = {}
    for name, group in groups.items():
        errors = sorted(abs(row["error"]) for row in group)
        if errors:
            ninth = errors[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)]
            bias = statistics.median(row["error"] for row in group)
            found[name] = {"rows": len(errors), "median": statistics.median(errors), "90th percentile": ninth, "median signed": bias}
    return found


def markdown(table: list[dict[str, Any]], figures: dict[str, Any], calibration: str) -> str:
    lines = [
        "# Predicted and measured seconds of whole models",
        "",
        "| over | rows | median error | 90th percentile | median signed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {f['rows']} | {f['median']:.1%} | {f['90th percentile']:.1%} | {f['median signed']:+.1%} |"
        for name, f in figures.items()
    ]
    lines += ["", "| model | batch | contender | predicted ms | measured ms | error | spread |", "|---|---|---|---|---|---|---|"]
    for row in table:
        name = row["model"] + (" (held back)" if row["held back"] else "")
        lines.append(
            f"| {name} | {row['batch']} | {row['contender']} | {row['predicted_s'] * 1e3:.2f} | {row['measured_s'] * 1e3:.2f} "
            f"| {row['error']:+.1%} | {row['spread']:.1%} |"
        )
    return "\n".join([*lines, "", "```", calibration, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two models, one batch size, few rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--thorough", action="store_true", help="calibrate thoroughly first")
    args = parser.parse_args()
    names, batches, rounds = (["encoder of 128", "separable net"], [1], 5) if args.smoke else (args.models, args.batches, args.rounds)
    usable = {name: RUNTIMES[name] for name, _ in CONTENDERS if RUNTIMES[name].refuses() is None}
    calibration = calibrate(usable, thorough=args.thorough)
    prices = Prices(calibration, Target.parse("cpu").device)
    table = []
    for name in names:
        for batch in batches:
            found = rows(name, batch, prices, rounds)
            table += found
            for row in found:
                print(
                    f"{name:>16} x {batch} {row['contender']:>15}: {row['predicted_s'] * 1e3:9.3f} ms predicted, "
                    f"{row['measured_s'] * 1e3:9.3f} measured, {row['error']:+.1%}", flush=True,
                )  # fmt: skip
    figures = summary(table)
    print(json.dumps(figures, indent=1))
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "prediction.json").write_text(json.dumps({"summary": figures, "rows": table}, indent=1) + "\n")
        (RESULTS / "prediction.md").write_text(markdown(table, figures, str(calibration)))


if __name__ == "__main__":
    main()
