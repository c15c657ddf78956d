"""The garbage collector, kept out of where graphs are built by the ten thousand nodes: a quarter of such a time is its."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection in this block. For short blocks: cycles made there stay until after it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
