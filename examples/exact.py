"""Exact rewrites only: the same function, on the fastest runtime that is installed. Prints the report."""

import torch

import paretorch
from paretorch.demo.run import test_images, trained_model

BATCH = 8

model = trained_model()
images, labels = test_images()
fast = paretorch.optimize(model, images[:BATCH])
print(fast.report)
with torch.no_grad():
    print("largest difference:", float((fast(images[:BATCH]) - model(images[:BATCH])).abs().max()))
