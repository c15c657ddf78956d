"""A progress bar for `optimize(progress=True)`: the stage, how far it is, and the time left."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar() -> Callable[[str, int, int], None]:
    """A function of (stage, done, of) that draws one bar per stage on standard error."""
    from rich.console import Console

    columns = (TextColumn("{task.description:>16}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def tell(stage: str, done: int, of: int) -> None:
        if stage not in tasks:
            progress.start()
            tasks[stage] = progress.add_task(stage, total=of)
        progress.update(tasks[stage], completed=done, total=of)
        if progress.finished:
            progress.stop()

    return tell
