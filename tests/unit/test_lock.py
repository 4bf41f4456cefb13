"""piflow_dist/launch/lock.py: one user of a folder at a time."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from piflow_dist.config import ConfigError
from piflow_dist.launch.lock import check_free, claim, note_submitted, only_user, release, taken_over

HOLD = "import sys; from pathlib import Path; from piflow_dist.launch.lock import only_user\n" + (
    "with only_user(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_user_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        message = rf"run_dir=run is in use by process {first.pid} on \S+\. Wait for it, or choose another folder\."
        with pytest.raises(ConfigError, match=message), only_user(lock, "run_dir=run"):
            pytest.fail("both had it")
        first.kill()
        first.wait()
    with only_user(lock, "run_dir=run"):
        assert lock.read_text().startswith(f"process {os.getpid()}")
    assert lock.read_text() == ""


def test_what_a_killed_launcher_leaves_is_waited_for(tmp_path: Path) -> None:
    """Its forked processes hold the lock until the last of their threads has ended."""
    child = "import os, time\nif os.fork() == 0: time.sleep(1); os._exit(0)\n"
    hold = HOLD.replace("print('held'", "exec(sys.argv[2]); print('held'")
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock"), child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        first.kill()
        first.wait()
        with only_user(tmp_path / ".lock", "run_dir=run"):
            pass


def test_an_error_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), only_user(tmp_path / ".lock", "x"):
        raise ValueError("inside")
    with only_user(tmp_path / ".lock", "x"):
        pass


def test_a_folder_that_cannot_be_written() -> None:
    with (
        pytest.raises(ConfigError, match="out=/dev/null/x cannot be written"),
        only_user(Path("/dev/null/x/.lock"), "out=/dev/null/x"),
    ):
        pass


# Jobs


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """squeue(shell commands): what asking SLURM for a job does; without a call there is no squeue."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in list(os.environ):
        if name.startswith(("SLURM", "PIFLOW")):
            monkeypatch.delenv(name)

    def squeue(commands: str) -> None:
        path = tmp_path / "bin" / "squeue"
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o755)

    return squeue


@pytest.fixture
def be_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def be_job(number: int, attempt: int = 0) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))

    return be_job


GONE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_a_folder_of_a_job_that_goes_on_is_nobody_elses(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    lock = tmp_path / "run" / ".lock"
    be_job(12)
    claim(lock, "run_dir=run")
    for state in ("RUNNING", "PENDING", "SUSPENDED"):
        squeue(f'case "$*" in *--jobs=12*) echo {state};; esac')
        refusal = rf"run_dir=run is in use by job 12 \({state.lower()}\)\. Wait for it, end it with scancel 12"
        be_job(13)
        with pytest.raises(ConfigError, match=refusal):
            claim(lock, "run_dir=run")
        with pytest.raises(ConfigError, match=refusal):
            check_free(lock, "run_dir=run")
        with pytest.raises(ConfigError, match=refusal), only_user(lock, "run_dir=run"):
            pytest.fail("both had it")
    assert lock.read_text() == "job 12, attempt 0"


@pytest.mark.parametrize("answer", ["echo CANCELLED", "echo NODE_FAIL", GONE])
def test_a_folder_of_a_job_that_is_over_is_free(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None], answer: str
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("job 12, attempt 3")
    squeue(answer)
    check_free(lock, "x")
    be_job(13)
    claim(lock, "x")
    assert lock.read_text() == "job 13, attempt 0"
    with only_user(lock, "x"):
        assert lock.read_text().startswith("process ")


def test_a_job_that_is_being_ended_is_waited_for(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    (tmp_path / ".lock").write_text("job 12, attempt 0")
    told = tmp_path / "told"
    squeue(f"if [ -e {told} ]; then echo CANCELLED; else : > {told}; echo COMPLETING; fi")
    be_job(13)
    claim(tmp_path / ".lock", "x")


def test_where_slurm_does_not_answer_nobody_is_taken_to_be_gone(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("job 12, attempt 0")
    be_job(13)
    with pytest.raises(
        ConfigError, match=rf"whether that is over cannot be told: there is no squeue here.*remove {lock}"
    ):
        claim(lock, "x")
    squeue("echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match="cannot be told: Unable to contact slurm controller"):
        claim(lock, "x")


def test_a_container_is_told_which_jobs_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("job 12_1, attempt 0")
    be_job(13)
    monkeypatch.setenv("PIFLOW_LIVE_JOBS", "12_1 RUNNING\n13 RUNNING")
    with pytest.raises(ConfigError, match=r"in use by job 12_1 \(running\)"):
        claim(lock, "x")
    monkeypatch.setenv("PIFLOW_LIVE_JOBS", "12_0 RUNNING\n13 RUNNING")
    claim(lock, "x")


def test_a_requeued_job_goes_on_and_its_old_attempt_learns_of_it(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    """Without asking SLURM, which may be away: there is no squeue here."""
    lock = tmp_path / ".lock"
    be_job(12, 0)
    claim(lock, "x")
    assert taken_over(lock) is None
    be_job(12, 1)
    claim(lock, "x")
    assert taken_over(lock) is None
    be_job(12, 0)
    assert taken_over(lock) == "job 12, attempt 1"
    with pytest.raises(ConfigError, match="in use by job 12, attempt 1. This is attempt 0"):
        claim(lock, "x")
    release(lock)
    assert lock.read_text() == "job 12, attempt 1"
    be_job(12, 1)
    release(lock)
    assert lock.read_text() == ""


def test_a_submitted_job_has_its_folder_before_it_starts(tmp_path: Path, be_job: Callable[..., None]) -> None:
    note_submitted(tmp_path / ".lock", "12_3")
    assert (tmp_path / ".lock").read_text() == "job 12_3, attempt 0"
    (tmp_path / ".lock").write_text("job 12_3, attempt 1")
    note_submitted(tmp_path / ".lock", "12_3")
    assert (tmp_path / ".lock").read_text() == "job 12_3, attempt 1"


def test_a_job_does_not_take_a_local_runs_folder(
    tmp_path: Path, squeue: Callable[[str], None], be_job: Callable[..., None]
) -> None:
    be_job(12)
    with only_user(tmp_path / ".lock", "x"):
        with pytest.raises(ConfigError, match=rf"x is in use by process {os.getpid()} on "):
            claim(tmp_path / ".lock", "x")
        # A file system without locks: the run is told by the file, and leaves the job's name there.
        (tmp_path / ".lock").write_text("job 12, attempt 0")
    assert (tmp_path / ".lock").read_text() == "job 12, attempt 0"


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: Callable[[str], None]
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = tmp_path / ".lock"
    with only_user(lock, "x"):
        assert lock.read_text().startswith("process ")
    squeue("echo RUNNING")
    lock.write_text("job 12, attempt 0")
    with pytest.raises(ConfigError, match=r"in use by job 12 \(running\)"), only_user(lock, "x"):
        pytest.fail("both had it")
