"""The seven workloads: real trained models with real data, by name."""

from __future__ import annotations

from importlib import import_module

from benchmarks.workloads.base import Workload

NAMES = ("dinov2", "minilm", "whisper", "gemma", "efficientnet", "ppocr", "albert")


def workload(name: str) -> Workload:
    """The workload of that name; its file is imported only when asked for, since each needs other packages."""
    if name not in NAMES:
        raise SystemExit(f"no workload named {name!r}; known: {', '.join(NAMES)}")
    found = import_module(f"benchmarks.workloads.{name}").WORKLOAD
    assert isinstance(found, Workload)
    return found
