"""The torch.library namespace of our own ops.

They are composite: every one is defined by torch ops, so export, autograd, fake tensors and torch.compile see through it.
"""

from typing import Any

import torch

LIBRARY: Any = torch.library.Library("paretorch", "DEF")
