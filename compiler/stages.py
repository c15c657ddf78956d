"""The clock of one `optimize`: named stages with their seconds and texts, progress, and the time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ProgressCallback = Callable[[str, int, int], None]  # stage, done, of


@dataclass
class Stages:
    """seconds: by stage, in the order in which they ran; texts: the graph after a stage, where there is one."""

    progress: ProgressCallback | None = None
    time_limit: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.tell(name, 0, 1)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.tell(name, 1, 1)

    def tell(self, name: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(name, done, of)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed; acted on between evaluations only."""
        return self.time_limit is not None and self.elapsed >= self.time_limit

    def share_of_rest(self, share: float) -> float:
        """The `elapsed` at which this share of the time that is left will have passed; infinity without a limit."""
        return float("inf") if self.time_limit is None else self.elapsed + share * max(self.time_limit - self.elapsed, 0.0)
