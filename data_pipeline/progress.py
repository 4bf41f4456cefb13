"""A progress bar with count, rate and remaining time, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as bars
from rich.console import Console


class Progress:
    """`with Progress(show) as progress, progress.stage("writing", 500) as advance: ... advance(32)`"""

    def __init__(self, show: bool = True):
        self._bars = bars.Progress(
            bars.TextColumn("{task.description:<18}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A new bar; the function given advances it by a number of items."""
        task_id = self._bars.add_task(name, total=total, rate="")
        task = next(task for task in self._bars.tasks if task.id == task_id)

        def advance(items: int) -> None:
            seconds = task.elapsed
            rate = f"{(task.completed + items) / seconds:,.0f}/s" if seconds else ""
            self._bars.update(task_id, advance=items, rate=rate)

        yield advance
