"""Signals that ask a training process to stop: USR1 and USR2 (before a time limit), TERM (preemption, cancellation).

Python runs signal handlers between two of its own instructions, hence not while a rank waits in a collective. The signal's
number is also written to a pipe at once, which a thread (launch/watchdog.py) reads.
"""

import os
import select
import signal
import time
from types import FrameType

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
REPEATED = 5.0
"""Seconds in which further signals are the same request: SLURM sends one to srun, which passes it on, and to its tasks."""


def hold() -> None:
    """Let signals wait until a StopRequest is there: starting a process takes longer than SLURM may be willing to wait."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def leave_to_parent() -> None:
    """In a forked worker of the data stream: SLURM signals whole groups of processes, and the worker is to serve to the end.

    Without this it would also write to its parent's pipe.
    """
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """What has been asked of this process so far. To be made in the main thread."""

    def __init__(self):
        self.first: signal.Signals | None = None
        self.first_at = 0.0
        self.pipe, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, self._ignore)
        os.register_at_fork(after_in_child=leave_to_parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    @property
    def made(self) -> bool:
        return self.first is not None

    @property
    def name(self) -> str:
        return "another rank's signal" if self.first is None else self.first.name

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """A handler must be there for the pipe to be written."""

    def wait(self, seconds: float) -> bool:
        """Wait for signals. Returns True where a second request has come: stop at once."""
        readable, _, _ = select.select([self.pipe], [], [], seconds)
        if not readable:
            return False
        now = time.monotonic()
        for number in os.read(self.pipe, 64):
            if number not in STOPPING:
                continue
            if self.first is None:
                self.first, self.first_at = signal.Signals(number), now
            elif now - self.first_at > REPEATED:
                return True
        return False
