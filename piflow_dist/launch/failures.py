"""The first failure of a job, told to all ranks within a second or two and kept in the run folder for the last lines of the log.

Without it, every rank whose partner died reports a failed collective of its own, some of them only at NCCL's time limit.
"""

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from piflow_dist.launch.exits import FAILED
from piflow_dist.launch.failure_record import SILENT, Failure, failure_path, write_failure, write_first_failure
from piflow_dist.launch.signals import StopRequest

log = logging.getLogger(__name__)

KEY = "piflow/failure"
ANSWERS = 3.0
"""Seconds in which the other ranks say where they are, and in which a rank that lost another waits for that one's own words."""
LOST = ("connection closed", "connection reset", "broken pipe", "socket", "nccl", "remote process exited", "timed out")
"""Words in the errors of a collective whose other end is gone."""


def is_lost_partner(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)


def tells_of_lost_partner(record: str) -> bool:
    """The same of "TypeName: text", as another process has written it."""
    return record.startswith(("RuntimeError", "Dist")) and any(word in record.lower() for word in LOST)


@contextmanager
def last_words(folder: Path, rank: int, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """For processes without a watchdog: the first error among them goes into the folder, for the last lines of the log.

    Exits at an expected error, whose text is all there is to say; others are raised.
    """
    try:
        yield
    except expected as error:
        write_first_failure(folder, Failure(rank, 0, "", str(error), str(error)))
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    except Exception as error:
        if not is_lost_partner(error):
            text = "".join(traceback.format_exception(error))
            write_first_failure(folder, Failure(rank, 0, "", f"{type(error).__name__}: {error}", text))
        raise


class Failures:
    """One job's failure, in the store through which its ranks met. Every call answers within seconds."""

    def __init__(self, rank: int, world_size: int, address: str, port: int, run_dir: Path):
        self.rank, self.world_size, self.run_dir = rank, world_size, run_dir
        # A connection of its own: the process group's is locked while a thread waits in it.
        self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        if rank == 0:
            failure_path(run_dir).unlink(missing_ok=True)

    def elsewhere(self) -> str | None:
        """The other rank that failed first, if one did; "0" where the store is gone, which rank 0 or its launcher holds."""
        try:
            first = self.store.get(KEY).decode() if self.store.check([KEY]) else None
        except dist.DistError:
            first = "0"
        return None if first == str(self.rank) else first

    def wait_for_another(self, request: StopRequest) -> bool:
        """For a rank that lost another one: whether a rank reports its own failure soon."""
        deadline = time.monotonic() + ANSWERS
        while time.monotonic() < deadline and not request.made:
            if self.elsewhere() is not None:
                return True
            time.sleep(0.1)
        return False

    def answer(self, step: int, phase: str) -> None:
        """Tell the rank that failed where this one is."""
        try:
            self.store.set(f"{KEY}/{self.rank}", f"step {step}, {phase}")
        except dist.DistError:
            log.warning("rank 0 is gone, and the store of the job with it")

    def report(self, failure: Failure) -> Failure | None:
        """Report this rank's failure. Returns it as kept in the run folder, or None where another rank's came first."""
        try:
            if self.store.compare_set(KEY, "", str(self.rank)).decode() != str(self.rank):
                self.answer(failure.step, failure.phase)
                return None
        except dist.DistError:
            log.warning("rank 0 is gone, and the store of the job with it")
        return self.keep(failure, self._collect())

    def keep(self, failure: Failure, said: dict[int, str]) -> Failure:
        """Write a failure to the run folder, with what other ranks answered."""
        others = {str(rank): said.get(rank, SILENT) for rank in range(self.world_size) if rank != self.rank}
        failure = replace(failure, others=others)
        write_failure(self.run_dir, failure)
        return failure

    def _collect(self) -> dict[int, str]:
        """What other ranks answer in time, as long as the store is there."""
        said: dict[int, str] = {}
        deadline = time.monotonic() + ANSWERS
        try:
            while len(said) < self.world_size - 1 and time.monotonic() < deadline:
                for rank in range(self.world_size):
                    if rank != self.rank and rank not in said and self.store.check([f"{KEY}/{rank}"]):
                        said[rank] = self.store.get(f"{KEY}/{rank}").decode()
                time.sleep(0.05)
        except dist.DistError:
            log.warning("rank 0 is gone, and with it the answers of other ranks")
        return said
