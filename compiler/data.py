"""The user's data, as batches that fit the captured graph, split into a part that ranks plans and a part that accepts them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paretorch.budget import Budget
from paretorch.capture import Program, as_call
from paretorch.ir.errors import BudgetError, InputError

RANKING_SHARE = 1 / 6  # the demo's 1,000 of 6,000; the rest decides acceptance
FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Batch:
    """inputs: flat, shaped as the graph takes them; labels: one per sample, or None; count: samples that are not padding."""

    inputs: tuple[Tensor, ...]
    labels: Any
    count: int


@dataclass(frozen=True)
class Split:
    """ranking orders plans; held_out, which never ranks anything, decides acceptance. Batches, or opaque items for `evaluate` budgets."""

    ranking: tuple[Any, ...]
    held_out: tuple[Any, ...]


def prepare(program: Program, data: Iterable[Any] | None, budget: Budget, seed: int) -> Split:
    """Read the data once and split it by a seeded hash. Raises BudgetError or InputError."""
    if data is None:
        raise BudgetError(f"a budget ({budget.unit} <= {budget.limit}) needs data=: an iterable of inputs, or of (inputs, labels)")
    items = list(data)
    if not items:
        raise BudgetError("data is empty; give some batches of real inputs, on which the loss can be measured")
    if budget.evaluate is not None:
        return split(items, seed)
    batches = [batch for number, item in enumerate(items) for batch in _batches(program, item, budget, number)]
    if len(batches) < 2:
        raise BudgetError(
            f"data gives {sum(batch.count for batch in batches)} samples in one batch; at least two batches of the example's size are needed, "
            "one to rank rewrites and one, never used for ranking, to accept the plan"
        )
    return split(batches, seed)


def split(items: Sequence[Any], seed: int) -> Split:
    """About one in six items ranks, the rest is held out; the same seed and count give the same split."""
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    ranking = max(1, round(len(items) * RANKING_SHARE))
    return Split(tuple(items[i] for i in sorted(order[:ranking])), tuple(items[i] for i in sorted(order[ranking:])))


def _batches(program: Program, item: Any, budget: Budget, number: int) -> list[Batch]:
    inputs, labels = _labelled(program, item, budget, number)
    leaves = program.leaves(inputs)
    rows = _rows(leaves, program.example)
    if all(leaf.shape == example.shape for leaf, example in zip(leaves, program.example, strict=True)) or rows is None:
        return [Batch(program.check(leaves), labels, rows or 1)]
    size = program.example[0].shape[0] if not program.is_dynamic else rows
    return [_cut(program, leaves, labels, start, size, rows) for start in range(0, rows, size)]


def _labelled(program: Program, item: Any, budget: Budget, number: int) -> tuple[Any, Any]:
    """Inputs and labels. Without a metric a pair is all inputs, unless its first part alone has as many tensors as the model takes."""
    pair = isinstance(item, (tuple, list)) and len(item) == 2
    if budget.metric is None:
        return (item[0] if pair and _tensors(item[0]) == len(program.example) - len(program.state) else item), None
    if not pair:
        raise InputError(f"item {number} of data is {type(item).__name__}; a budget with a metric needs pairs (inputs, labels)")
    return item[0], item[1]


def _tensors(inputs: Any) -> int:
    """How many tensors there are in what may be inputs."""
    try:
        return sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(as_call(inputs)))
    except InputError:
        return 0


def _rows(leaves: Sequence[Tensor], example: Sequence[Tensor]) -> int | None:
    """Samples in an item: the first axis of its first tensor, if that is a batch axis."""
    if not leaves or leaves[0].ndim == 0 or leaves[0].shape[1:] != example[0].shape[1:]:
        return leaves[0].shape[0] if leaves and leaves[0].ndim else None
    return leaves[0].shape[0]


def _cut(program: Program, leaves: Sequence[Tensor], labels: Any, start: int, size: int, rows: int) -> Batch:
    """Samples start to start + size; a short last batch is filled with copies of its last sample."""
    count = min(size, rows - start)
    chosen = torch.tensor([min(start + i, rows - 1) for i in range(size)])
    batched = [example.ndim > 0 and example.shape[0] == program.example[0].shape[0] for example in program.example]
    inputs = tuple(leaf[chosen] if is_batched else leaf for leaf, is_batched in zip(leaves, batched, strict=True))
    return Batch(program.check(inputs), _take(labels, start, count), count)


def _take(labels: Any, start: int, count: int) -> Any:
    """The labels of some samples; of a dict those of each entry."""
    if isinstance(labels, dict):
        return {name: _take(values, start, count) for name, values in labels.items()}
    return None if labels is None else labels[start : start + count]


def map_outputs(outputs: Any, count: int, padded: int) -> Any:
    """The outputs of the first `count` samples, wherever an output's first axis is the padded batch."""
    if count == padded:
        return outputs
    cut: Callable[[Any], Any] = lambda x: x[:count] if isinstance(x, Tensor) and x.ndim and x.shape[0] == padded else x  # noqa: E731
    return pytree.tree_map(cut, outputs)
