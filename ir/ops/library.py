"""The torch.library namespace of our own ops.

They are composite: every one is defined by torch ops, so export, autograd, fake tensors and torch.compile see through it.
"""

import torch

LIBRARY = torch.library.Library("paretorch", "DEF")
