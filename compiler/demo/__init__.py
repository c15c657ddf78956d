"""The demo: a trained vision transformer, test images, and one search at several budgets."""

from paretorch.demo.model import FashionViT

__all__ = ["FashionViT"]
