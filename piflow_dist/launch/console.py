"""What people see: progress as a live bar on a terminal, plain lines with the remaining time elsewhere; logs; commands to type."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from piflow_dist.tracking.secrets import mask

console = Console()


def program(name: str) -> str:
    """How to type a program of this environment here: its name where that finds it, else its path."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path) or not path.exists():
        return name
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    near = str(path.relative_to(Path.cwd()))
    return near if "/" in near else f"./{near}"


def is_slurm_task() -> bool:
    """Started by srun itself. What it prints goes to a log, although srun --unbuffered makes it look like a terminal."""
    return "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


class StepProgress:
    """Progress of `total` steps. `update(step, text)` after each; plain lines every `every` steps without a terminal.

    lines: a file that gets the plain lines in any case, behind what is there.
    """

    def __init__(self, title: str, total: int, start: int = 0, every: int = 10, lines: Path | None = None):
        self.title, self.total, self.start, self.every, self.lines = title, total, start, every, lines
        self.began = time.monotonic()
        self.bar = self.file = None

    def __enter__(self) -> "StepProgress":
        if self.lines is not None:
            self.lines.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.lines, "a", buffering=1)  # noqa: SIM115  (__exit__ closes it)
        if console.is_terminal and not is_slurm_task():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, text="")
        return self

    def update(self, step: int, text: str = "") -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        if step % self.every and step != self.total:
            return
        per_step = (time.monotonic() - self.began) / max(step - self.start, 1)
        line = (
            f"{self.title} {step}/{self.total}  eta {timedelta(seconds=round(per_step * (self.total - step)))}  {text}"
        )
        if self.bar is None:
            print(line, flush=True)
        if self.file is not None:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=self.file)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()


class StepLine:
    """A training step in a few words. Figures that only some steps have are those of the last one that had them."""

    def __init__(self) -> None:
        self.known: dict[str, float] = {}

    def __call__(self, metrics: Mapping[str, float], next_save: int | None) -> str:
        """metrics: docs/tracking.md. next_save: step of the next checkpoint, None where the clock decides it."""
        self.known |= metrics
        known = self.known
        parts = [f"loss {known['loss']:.4f}", f"grad {known['grad_norm']:.3g}", f"{known['seconds']:.3f} s/step"]
        memory = known.get("memory/peak_gib", known.get("memory/host_gib"))
        if memory is not None:
            parts.append(f"{memory:.1f} GiB")
        if "data_wait" in known:
            parts.append(f"data {known['data_wait']:.1%}")
        if next_save is not None:
            parts.append(f"saves at {next_save}")
        return "  ".join(parts)


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress(done, total) for work whose total is known only when it starts; four plain lines without a terminal."""
    with ExitStack() as stack:
        bars: list[StepProgress] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(StepProgress(title, total, every=max(1, -(-total // 4)))))
            bars[0].update(done)

        yield progress


class MaskingFormatter(logging.Formatter):
    """Addresses with passwords reach the log in other libraries' messages, too."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


def start_logging(rank: int, folder: Path, level: str = "INFO") -> TextIO:
    """Messages of this package to folder/rank_N.log and, on rank 0, to stderr. Returns the stream of the job's own output.

    Under srun all ranks share one output; as torchrun does, what ranks other than 0 print goes to a file, rank_N.out.
    """
    console = sys.stderr
    if rank != 0 and is_slurm_task():
        console = os.fdopen(os.dup(2), "w")
        output = os.open(folder / f"rank_{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank_{rank}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
    layout = MaskingFormatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    for handler in handlers:
        handler.setFormatter(layout)
    root = logging.getLogger()
    root.handlers, root.level = handlers, logging.WARNING
    logging.getLogger("piflow_dist").setLevel(level)
    return console
