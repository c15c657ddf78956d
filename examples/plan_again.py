"""A plan is data: it is saved as JSON and applied to the same architecture with other weights, without a search."""

import tempfile
from pathlib import Path

import torch

import paretorch
from paretorch.demo.model import FashionViT
from paretorch.demo.run import test_images, trained_model

BATCH = 4

images, _ = test_images()
plan = paretorch.optimize(trained_model(), images[:BATCH]).plan
with tempfile.TemporaryDirectory() as folder:
    plan.save(Path(folder) / "plan.json")
    loaded = paretorch.Plan.load(Path(folder) / "plan.json")
print(loaded)
torch.manual_seed(0)
other = FashionViT().eval()
again = loaded.apply(other, images[:BATCH])
print(again.report.sentence())
