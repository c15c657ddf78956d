"""paretorch makes trained PyTorch models faster on the hardware at hand, within a quality budget that you state."""

from paretorch import metrics
from paretorch.artifact import load
from paretorch.budget import Budget
from paretorch.capture import capture
from paretorch.cost_model.devices import Target
from paretorch.ir.errors import ParetorchError
from paretorch.optimize import optimize
from paretorch.optimized import Optimized
from paretorch.plan import Choice, Plan
from paretorch.rewrites import rules_named

__version__ = "0.1.0"

__all__ = ["Budget", "Choice", "Optimized", "ParetorchError", "Plan", "Target", "capture", "load", "metrics", "optimize", "rules_named"]
