"""A rank's watchdog: ends a process that makes no progress, that was told twice to stop, whose job has failed elsewhere, or
whose run folder is another's now.

Two threads, since the main one may wait in a collective for ever: one for the clock and for signals, one that asks the
store of the job for failures of other ranks.
"""

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import TextIO

from piflow_dist.config import Config, WatchdogConfig
from piflow_dist.launch.exits import FAILED, HUNG, STOPPED_AT_ONCE
from piflow_dist.launch.failure_record import Failure
from piflow_dist.launch.failures import ANSWERS, Failures, is_lost_partner
from piflow_dist.launch.lock import LOCK, taken_over
from piflow_dist.launch.signals import StopRequest
from piflow_dist.parallel.topology import Topology

log = logging.getLogger(__name__)

END_TIME = "PIFLOW_END_TIME"
"""Variable: when the job's time is up, in seconds since 1970. SLURM has had one of its own since 23.02."""
RESERVE = 15.0
"""Seconds before that at which a stopped process is gone, so that the job is still there to be requeued."""
TICK = 0.5
"""Seconds between looks at the clock and at the store."""
STEPS = 31
"""Steps of the running median."""
BEYOND = 60.0
"""Seconds after its limit at which a process is ended by a timer that needs no Python: something holds the interpreter."""


def start_watchdog(config: Config, topology: Topology, logs: Path, console: TextIO) -> "Watchdog":
    """The watchdog of this process, and its signals; needs the environment that start_process_group has set."""
    failures = Failures(
        topology.rank,
        topology.world_size,
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        Path(config.run_dir),
    )
    end = os.environ.get(END_TIME) or os.environ.get("SLURM_JOB_END_TIME")
    stop_before = float(end) - RESERVE if end else None
    return Watchdog(config.watchdog, failures, StopRequest(), logs / f"rank_{topology.rank}.log", console, stop_before)


class StepClock:
    """How long the present phase may take, from how long the steps before took."""

    def __init__(self, config: WatchdogConfig):
        self.config = config
        self.seconds: deque[float] = deque(maxlen=STEPS)

    def step_limit(self) -> float:
        """Seconds; the first steps compile, allocate and connect, and have startup_seconds."""
        if len(self.seconds) < self.config.steps_before:
            return self.config.startup_seconds
        return max(self.config.minimum_seconds, self.config.factor * statistics.median(self.seconds))


class Watchdog:
    """`with Watchdog(...) as watchdog:` around a training; the main thread says with begin_step(), enter() and end_step() where it is."""

    def __init__(
        self,
        config: WatchdogConfig,
        failures: Failures,
        request: StopRequest,
        log_file: Path,
        console: TextIO,
        stop_before: float | None = None,
    ):
        """stop_before: the time (time.time()) at which the job's time is up; a process told to stop is gone by then."""
        self.failures, self.request, self.console, self.stop_before = failures, request, console, stop_before
        self.clock = StepClock(config)
        self.step, self.phase, self.phase_began = 0, "start", time.monotonic()
        self.span = (self.phase_began, config.startup_seconds)
        """(when it began, how long it may take) of what is under way; replaced as one, as a thread reads it at any time."""
        self.log_file = open(log_file, "a")  # noqa: SIM115  (open as long as the process)
        self.closing = threading.Event()
        self.ending = threading.Lock()
        self.threads = [
            threading.Thread(target=self._watch_clock, name="watchdog", daemon=True),
            threading.Thread(target=self._watch_others, name="watchdog of other ranks", daemon=True),
        ]

    def __enter__(self) -> "Watchdog":
        for thread in self.threads:
            thread.start()
        self._begin(self.clock.config.startup_seconds)
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self.threads:
            thread.join()

    @property
    def stop_requested(self) -> bool:
        return self.request.made

    def begin_step(self, step: int) -> None:
        """step: the one (from 1) that begins."""
        self.step = step
        self._begin(self.clock.step_limit())

    def enter(self, phase: str) -> None:
        """The name of what the main thread does from here on, within a step."""
        self.phase, self.phase_began = phase, time.monotonic()

    def end_step(self, phase: str) -> None:
        """What follows until the next step has a limit of its own: a save, the end."""
        self.clock.seconds.append(time.monotonic() - self.span[0])
        self.enter(phase)
        self._begin(self.clock.config.startup_seconds)

    def _begin(self, limit: float) -> None:
        self.span = (time.monotonic(), limit)
        if self.clock.config.factor:
            faulthandler.dump_traceback_later(limit + BEYOND, exit=True, file=self.log_file)

    def _watch_clock(self) -> None:
        while not self.closing.is_set():
            if self.request.wait(TICK):
                self._end(STOPPED_AT_ONCE, "A second signal: this process ends at once, without a checkpoint.")
            if self.request.made and self.stop_before is not None and time.time() > self.stop_before:
                self._end(STOPPED_AT_ONCE, "No time is left for a checkpoint: this process ends at once.")
            began, limit = self.span
            waited = time.monotonic() - began
            if self.clock.config.factor and waited > limit and not self.closing.is_set():
                with self.ending:
                    self._hang(waited, limit)

    def _watch_others(self) -> None:
        lock = self.failures.run_dir / LOCK
        while not self.closing.wait(2 * TICK):
            # Rank 0 writes checkpoints' names and metrics. A lost node may go on with an attempt that has been put back.
            other = taken_over(lock) if self.failures.rank == 0 else None
            if other is not None and not self.closing.is_set():
                with self.ending:
                    self._end(
                        FAILED,
                        f"{lock.parent} is in use by {other} now: this process ends, in step {self.step}, {self.phase}.",
                    )
            rank = self.failures.elsewhere()
            if rank is None or self.closing.is_set():
                continue
            with self.ending:
                self.failures.answer(self.step, self.phase)
                self._keep_store()
                self._end(FAILED, f"Rank {rank} has failed: this one ends too, in step {self.step}, {self.phase}.")

    def _hang(self, waited: float, limit: float) -> None:
        config, seconds = self.clock.config, self.clock.seconds
        typical = f"{statistics.median(seconds):.2f} s" if seconds else "unknown"
        message = (
            f"No progress for {waited:.1f} s, of them {time.monotonic() - self.phase_began:.1f} s in {self.phase}. The limit is "
            f"{limit:.1f} s: a step takes {typical}, watchdog.factor={config.factor:g}, "
            f"watchdog.minimum_seconds={config.minimum_seconds:g}, watchdog.startup_seconds={config.startup_seconds:g}."
        )
        self._end(HUNG, *self._report(message, f"{self._stacks()}{message}"))

    def failed(self, error: BaseException) -> None:
        """The main thread has raised: report it, unless all it says is that another rank is gone. Ends this process."""
        text = "".join(traceback.format_exception(error))
        if is_lost_partner(error):
            if self.failures.wait_for_another(self.request):
                threading.Event().wait()  # _watch_others ends this process
            if self.request.made:  # the launcher has seen that rank end, and ends the others
                self._end(FAILED, self._in_short("Another rank is gone", text))
        with self.ending:
            self._end(FAILED, *self._report(traceback.format_exception_only(error)[-1].strip(), text))

    def _report(self, reason: str, text: str) -> tuple[str, bool]:
        """What to say, and whether everybody should hear it; within seconds even where the store is what hangs."""
        kept: list[Failure | None] = []
        failure = Failure(self.failures.rank, self.step, self.phase, reason, text)
        thread = threading.Thread(target=lambda: kept.append(self.failures.report(failure)), daemon=True)
        thread.start()
        thread.join(3 * ANSWERS)
        first = kept[0] if kept else self.failures.keep(failure, {})
        if first is not None:
            return first.describe(), True
        self._keep_store()
        return self._in_short("Another rank failed first", text), False

    def _keep_store(self) -> None:
        """The store may go with rank 0, while another rank still collects its answers there."""
        if self.failures.rank == 0:
            time.sleep(ANSWERS + 1)

    def _in_short(self, what: str, text: str) -> str:
        """For what is a consequence only: the text goes to this rank's own log."""
        self.log_file.write(f"{text.rstrip()}\n")
        self.log_file.flush()
        return f"{what}: this one ends too, in step {self.step}, {self.phase}."

    def _stacks(self) -> str:
        """The stacks of all threads; faulthandler writes to files only."""
        begin = self.log_file.seek(0, os.SEEK_END)
        faulthandler.dump_traceback(file=self.log_file, all_threads=True)
        with open(self.log_file.name) as written:
            written.seek(begin)
            return written.read()

    def _end(self, code: int, message: str, loud: bool = False) -> None:
        """End this process from whatever thread. The interpreter's own end might wait for the main thread, or for NCCL."""
        log.error("%s", message)
        if loud and self.failures.rank != 0:  # whose messages go to the console anyway
            print(message, file=self.console, flush=True)
        sys.stdout.flush()
        os._exit(code)


class Unwatched:
    """In a Watchdog's place where nobody watches: tests, benchmarks."""

    stop_requested = False

    def begin_step(self, step: int) -> None: ...

    def enter(self, phase: str) -> None: ...

    def end_step(self, phase: str) -> None: ...


UNWATCHED = Unwatched()
