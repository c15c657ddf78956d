"""A budget without labels: outputs may move by two percent. Prints what was applied and why the rest was not."""

import paretorch
from paretorch.demo.run import test_images, trained_model

BATCH, BATCHES = 8, 16

images, _ = test_images()
batches = [images[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)]
fast = paretorch.optimize(trained_model(), batches[0], budget=paretorch.Budget(drift=0.02), data=batches, time_limit=20)
print(fast.report)
print(fast.explain())
