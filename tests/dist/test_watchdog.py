"""What a job does when one of its ranks raises, hangs, is stopped or is told twice to end: three gloo processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPO
from ports import kept_port

from piflow_dist.launch.exits import FAILED, HUNG, STOPPED_AT_ONCE
from piflow_dist.launch.failure_record import read_failure
from piflow_dist.launch.watchdog import END_TIME

PATIENCE = 240.0
# A training's loop without a model: data, then a collective in which ranks wait for each other.
RANK = textwrap.dedent("""
    import sys, time, types
    from pathlib import Path
    import torch, torch.distributed as dist
    from piflow_dist.config import WatchdogConfig
    from piflow_dist.launch.console import start_logging
    from piflow_dist.launch.signals import hold
    from piflow_dist.launch.watchdog import start_watchdog
    from piflow_dist.parallel.topology import start_process_group

    run_dir, what = Path(sys.argv[1]), sys.argv[2]
    hold()
    topology = start_process_group("cpu", 600)
    config = types.SimpleNamespace(
        run_dir=str(run_dir), watchdog=WatchdogConfig(factor=5, minimum_seconds=float(sys.argv[3]), startup_seconds=600)
    )
    console = start_logging(topology.rank, run_dir / "logs")
    with start_watchdog(config, topology, run_dir / "logs", console) as watchdog:
        try:
            for step in range(1, 100_000):
                watchdog.begin_step(step)
                watchdog.enter("data")
                if topology.rank == 1 and step == 12 and what == "raises":
                    raise ValueError("a shard is damaged")
                if topology.rank == 1 and step == 12 and what == "hangs":
                    time.sleep(600)
                watchdog.enter("loss")
                dist.all_reduce(torch.ones(1))
                watchdog.end_step("metrics")
                if topology.is_main:
                    (run_dir / "step").write_text(str(step))
                time.sleep(0.01)
        except BaseException as error:
            watchdog.failed(error)
            raise
""")


@dataclass
class Job:
    run_dir: Path
    ranks: list[subprocess.Popen]

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and output of the ranks."""
        said = [rank.communicate(timeout=PATIENCE)[0] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks], said

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank_{rank}.log").read_text()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while int((self.run_dir / "step").read_text() or 0) < step:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in self.ranks)
            time.sleep(0.05)


@pytest.fixture
def port() -> Iterator[int]:
    with kept_port() as port:
        yield port


@pytest.fixture
def start(tmp_path: Path, port: int):
    jobs: list[Job] = []

    def start(what: str, minimum_seconds: float = 200.0, **variables_of_all: str) -> Job:
        (tmp_path / "logs").mkdir()
        (tmp_path / "step").write_text("0")
        ranks = []
        for rank in range(3):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, str(tmp_path), what, str(minimum_seconds)],
                    env={**environment, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(REPO), **variables_of_all},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        jobs.append(Job(tmp_path, ranks))
        return jobs[-1]

    yield start
    for job in jobs:
        for rank in job.ranks:
            rank.kill()
            rank.wait()


def test_the_rank_that_raised_is_the_one_that_is_heard(start: Callable[..., Job]) -> None:
    job = start("raises")
    codes, said = job.end()
    assert codes == [FAILED, FAILED, FAILED]
    assert (
        "ValueError: a shard is damaged\nRank 1 failed in step 12, data. The others: rank 0, 2: step 12, loss."
        in said[1]
    )
    assert "Traceback" not in said[0] + said[2] and "Connection" not in said[0] + said[2]
    assert "Rank 1 has failed: this one ends too, in step 12, loss." in job.log(0)
    failure = read_failure(job.run_dir)
    assert (failure.rank, failure.step, failure.phase, failure.reason) == (
        1,
        12,
        "data",
        "ValueError: a shard is damaged",
    )


def test_a_rank_that_hangs_is_named_with_its_step_phase_and_stacks(start: Callable[..., Job]) -> None:
    job = start("hangs", minimum_seconds=10)
    codes, _ = job.end()
    assert HUNG in codes and set(codes) <= {HUNG, FAILED}
    failure = read_failure(job.run_dir)
    places = {str(failure.rank): f"step {failure.step}, {failure.phase}", **failure.others}
    assert places == {"0": "step 12, loss", "1": "step 12, data", "2": "step 12, loss"}
    assert "No progress for" in failure.reason and "watchdog.minimum_seconds=10" in failure.reason
    assert "most recent call first" in failure.text and "Thread 0x" in failure.text  # faulthandler, all threads


def test_a_rank_that_does_not_answer_is_named(start: Callable[..., Job]) -> None:
    """Rank 0 holds the store: the others must end without it."""
    job = start("goes on", minimum_seconds=10)
    job.wait_for_step(12)
    os.kill(job.ranks[0].pid, signal.SIGSTOP)
    codes = [job.ranks[rank].wait(PATIENCE) for rank in (1, 2)]
    assert HUNG in codes and set(codes) <= {HUNG, FAILED}
    failure = read_failure(job.run_dir)
    assert failure.rank in (1, 2) and failure.phase == "loss"
    assert failure.others["0"] == "does not answer"


def test_a_killed_rank_ends_the_others(start: Callable[..., Job]) -> None:
    job = start("goes on")
    job.wait_for_step(5)
    job.ranks[1].kill()
    codes, _ = job.end()
    assert codes == [FAILED, -signal.SIGKILL, FAILED]


def test_a_job_that_has_been_put_back_leaves_the_folder_to_its_next_attempt(start: Callable[..., Job]) -> None:
    """As where a node is lost to SLURM, but not to the file system."""
    job = start("goes on", SLURM_JOB_ID="77", SLURM_RESTART_COUNT="2")
    (job.run_dir / ".lock").write_text("job 77, attempt 2")
    job.wait_for_step(5)
    (job.run_dir / ".lock").write_text("job 77, attempt 3")
    codes, _ = job.end()
    assert codes == [FAILED, FAILED, FAILED]
    assert f"{job.run_dir} is in use by job 77, attempt 3 now: this process ends" in job.log(0)
    assert read_failure(job.run_dir) is None


def test_without_time_for_a_checkpoint_the_end_comes_at_once(start: Callable[..., Job]) -> None:
    """No more than RESERVE seconds are left when the first signal comes; before it, the time that is left does not matter."""
    job = start("goes on", **{END_TIME: str(time.time() + 1)})
    job.wait_for_step(5)
    os.kill(job.ranks[2].pid, signal.SIGUSR1)
    codes, _ = job.end()
    assert codes[2] == STOPPED_AT_ONCE and "No time is left for a checkpoint" in job.log(2)


def test_one_signal_waits_for_the_step_and_two_do_not(start: Callable[..., Job]) -> None:
    """The loop here does not end by itself on the first: it is only noted, also while a rank is stuck in a collective."""
    job = start("goes on")
    job.wait_for_step(5)
    os.kill(job.ranks[1].pid, signal.SIGSTOP)  # the others wait for it, in C++
    os.kill(job.ranks[2].pid, signal.SIGUSR1)
    time.sleep(6)  # signals that follow sooner are the same request (signals.REPEATED)
    assert job.ranks[2].poll() is None
    os.kill(job.ranks[2].pid, signal.SIGTERM)
    assert job.ranks[2].wait(PATIENCE) == STOPPED_AT_ONCE
    assert "A second signal" in job.log(2)
