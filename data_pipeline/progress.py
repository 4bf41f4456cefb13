"""A progress bar with count, rate and remaining time, on standard error; in a log file a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as bars
from rich.console import Console

LINE_SECONDS = 30.0


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
    def stage(self, name: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
        """A new bar, `completed` of it done earlier; the function given advances it by a number of items."""
        task_id = self._bars.add_task(name, total=total, completed=completed, rate="")
        task = next(task for task in self._bars.tasks if task.id == task_id)
        told = time.monotonic()

        def advance(items: int) -> None:
            nonlocal told
            done, seconds = task.completed + items - completed, task.elapsed
            rate = f"{done / seconds:,.0f}/s" if seconds else ""
            self._bars.update(task_id, advance=items, rate=rate)
            if not self._bars.console.is_terminal and time.monotonic() - told > LINE_SECONDS and done:
                told = time.monotonic()
                left = (total - task.completed) * seconds / done
                self._bars.console.print(
                    f"{name}: {task.completed:,.0f} of {total:,}, {rate}, {left / 60:,.0f} min left"
                )

        yield advance
