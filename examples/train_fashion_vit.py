"""Train the ViT that `paretorch demo` optimises: 197 tokens, 10 classes, Fashion-MNIST.

The data is Zalando's Fashion-MNIST (MIT licence) as Debian packages it:
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb data

    python examples/train_fashion_vit.py --data data/usr/share/datasets/fashion-mnist --out build/fashion_vit

Training saves a checkpoint after each epoch and takes it up again when started anew. At the end, `--export FOLDER` writes what the
package ships: the weights in half precision (safetensors) and 6,000 labelled test images.
Half of the patches are dropped at random while training (Li et al. 2023, arXiv:2212.00794), which halves its time.
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from paretorch.demo.model import FashionViT

EPOCHS = 6
BATCH = 128
PEAK_LEARNING_RATE = 2e-3
KEPT_PATCHES = 98  # of 196, while training
SHIPPED_IMAGES = 6_000


def read_idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def augment(images: Tensor) -> Tensor:
    """Flip half of the images, shift each batch by up to two pixels."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    shift = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(flipped, shift, (2, 3))


@torch.inference_mode()
def accuracy(model: FashionViT, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        (model(images[i : i + 250].float() / 255).argmax(1) == labels[i : i + 250]).sum().item() for i in range(0, len(images), 250)
    )
    model.train()
    return right / len(images)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    images, labels = load(args.data, "train")
    test_images, test_labels = load(args.data, "t10k")
    model = FashionViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    steps, started = len(images) // BATCH, time.time()
    for epoch in range(first, EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for step in range(steps):
            done = (epoch * steps + step) / (EPOCHS * steps)
            rate = PEAK_LEARNING_RATE * min(1, (epoch * steps + step + 1) / 150) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = order[step * BATCH : (step + 1) * BATCH]
            batch = augment(images[rows].float() / 255)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(batch, kept_patches=KEPT_PATCHES)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                print(f"epoch {epoch} step {step}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, checkpoint)
        print(f"epoch {epoch}: test top-1 {accuracy(model, test_images[:2000], test_labels[:2000]):.4f} (first 2000)", flush=True)
    print(f"test top-1 {accuracy(model, test_images, test_labels):.4f} (10000)", flush=True)


def export(out: Path, data: Path, folder: Path) -> None:
    """Write the files that `paretorch.demo` ships; the images are the first 6,000 of the test set."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in half.items()}, folder / "fashion_vit.safetensors")
    images, labels = load(data, "t10k")
    np.savez_compressed(
        folder / "fashion_test.npz",
        images=images[:SHIPPED_IMAGES, 0].numpy(),
        labels=labels[:SHIPPED_IMAGES].numpy().astype(np.uint8),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--out", type=Path, default=Path("build/fashion_vit"), help="where the checkpoint is kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--export", type=Path, help="write the package data here and stop")
    args = parser.parse_args()
    if args.export:
        export(args.out, args.data, args.export)
    else:
        train(args)


if __name__ == "__main__":
    main()
