"""Metrics for budgets: one score per sample, higher is better."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paretorch.ir.errors import BudgetError


def top1(outputs: Any, labels: Any) -> Tensor:
    """1 where the largest entry of the last axis is the label, else 0. outputs: logits T[B, classes], or a structure that has them first."""
    logits = _first_tensor(outputs)
    right: Tensor = logits.argmax(-1) == labels.to(logits.device)
    return right.double()


def _first_tensor(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return _first_tensor(outputs["logits"] if "logits" in outputs else next(iter(outputs.values())))
    if isinstance(outputs, (tuple, list)) and outputs:
        return _first_tensor(outputs[0])
    raise BudgetError(f"top1 found no logits in outputs of type {type(outputs).__name__}; write a metric for this model")
