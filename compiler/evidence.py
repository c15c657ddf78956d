"""What a search measured on the ranking data, kept on disk: called again, or taken up after an interruption, it measures nothing twice.

Held-out data and the clock are never kept: they are measured anew each time, so a stale entry can cost speed but no quality.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from paretorch.budget import Budget
from paretorch.cost_model.fingerprint import cache_folder
from paretorch.data import Batch, Split
from paretorch.ir.graph import Graph
from paretorch.ir.hash import structural_hash
from paretorch.metrics import CorpusMetric, Metric

PLAIN = (int, float, str, bytes, bool, type(None))


class Evidence:
    """Numbers by name, written to a file whenever one is added. path: None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.values: dict[str, list[float]] = {}
        try:
            kept = json.loads(path.read_text()) if path is not None else {}
            self.values = {str(name): [float(x) for x in numbers] for name, numbers in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: measured again
            pass

    def get(self, name: str) -> list[float] | None:
        return self.values.get(name)

    def put(self, name: str, numbers: list[float]) -> None:
        """Keep them; a folder that cannot be written costs the next search its time and nothing else."""
        self.values[name] = numbers
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = self.path.with_suffix(f".{os.getpid()}")
            half.write_text(json.dumps(self.values, indent=1, sort_keys=True))
            half.replace(self.path)
        except OSError:
            self.path = None


def evidence_of(graph: Graph, budget: Budget, split: Split, seed: int) -> Evidence:
    """The evidence on this graph with these weights, this data, this measure of loss, and these rules."""
    how = _scorer_mark(budget.scorer) if budget.scorer is not None else budget.measure
    if how is None or not all(_is_plain(item) for item in split.ranking):
        return Evidence(None)
    digest = hashlib.blake2b(digest_size=12)
    for part in (structural_hash(graph), how, str(seed), torch.__version__, _rules_mark()):
        digest.update(part.encode() + b"\0")
    _add_tensors(digest, (graph.constants[name] for name in sorted(graph.constants)))
    for item in split.ranking:
        if isinstance(item, Batch):
            _add_tensors(digest, (leaf for leaf in (*item.inputs, item.labels) if isinstance(leaf, Tensor)))
        digest.update(repr(None if isinstance(item, Batch) and isinstance(item.labels, Tensor) else getattr(item, "labels", item)).encode())
    return Evidence(cache_folder() / f"evidence-{digest.hexdigest()}.json")


def _is_plain(item: Any) -> bool:
    """Whether an item of data can be told from others by its numbers or its text."""
    labels = item.labels if isinstance(item, Batch) else item
    return isinstance(labels, (Tensor, *PLAIN)) or (isinstance(labels, (list, tuple)) and all(isinstance(x, PLAIN) for x in labels))


def _add_tensors(digest: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _scorer_mark(scorer: Metric) -> str | None:
    """What a metric computes, as text; None if that cannot be told of one of its functions."""
    if not isinstance(scorer, CorpusMetric):
        return _function_mark(scorer)
    parts = (scorer.collect, scorer.score, scorer.without_each)
    marks = [_function_mark(part) for part in parts if part is not None]
    return None if None in marks else f"{scorer.name} {marks}"


def _function_mark(function: Callable[..., Any]) -> str | None:
    """What a function computes, as text; None if that cannot be told, as for objects with state."""
    code = getattr(function, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if code is None or not all(isinstance(value, PLAIN) for value in cells):
        return None
    return f"{function.__module__}.{function.__qualname__} {_code_mark(code)} {cells!r} {getattr(function, '__defaults__', None)!r}"


def _code_mark(code: CodeType) -> str:
    constants = [_code_mark(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode()).hexdigest()[:16]


@cache
def _rules_mark() -> str:
    """Changes with the sources of the rules, of the graph and of the metrics, whose functions call others."""
    import paretorch.ir
    import paretorch.metrics
    import paretorch.rewrites

    digest = hashlib.sha256(Path(paretorch.metrics.__file__).read_bytes())
    for package in (paretorch.ir, paretorch.rewrites):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
