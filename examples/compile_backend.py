"""paretorch as a backend of torch.compile: the exact rewrites in front of inductor."""

import torch

from paretorch.demo.run import test_images, trained_model

BATCH = 4

model = trained_model()
images, _ = test_images()
compiled = torch.compile(model, backend="paretorch")
with torch.no_grad():
    print("largest difference:", float((compiled(images[:BATCH]) - model(images[:BATCH])).abs().max()))
