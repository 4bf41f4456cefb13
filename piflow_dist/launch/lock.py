"""One user of a folder at a time: a process of this machine, or a SLURM job across its requeues.

The lock's file says who: "process 4711 on login1", "job 12, attempt 3". A process also holds the file's lock, which the kernel takes
from one that is killed. A job cannot: its attempts run on other nodes, and the next one must not wait for what a lost node may still
hold. So SLURM is asked whether the job that the file names is still there.
Not every shared file system passes locks between nodes. Therefore who trains also looks whether the file still names it
(`taken_over`, launch/watchdog.py), and ends where it does not.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from piflow_dist.config import ConfigError
from piflow_dist.launch.job_state import OVER, Unknown, settled_state
from piflow_dist.parallel.environment import LAUNCHER_PID

LOCK = ".lock"
"""Of a run folder."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
BRIEF = 10.0
"""Seconds for jobs that hold the lock while they look into the file, and for what a killed launcher leaves: its forked processes hold
the lock too, and a thread that writes to the disk ends when it has written."""


@contextmanager
def only_user(lock: Path, option: str) -> Iterator[None]:
    """Hold the file `lock`, which stays behind empty. Raises ConfigError where another process, or a job, has the folder.

    option: "key=folder" of the request, for the message.
    """
    with locked(lock, option) as handle:
        refuse_job(read(handle), None, lock, option)
        me = process_name(os.getpid())
        write(handle, me)
        try:
            yield
        finally:
            if read(handle) == me:
                write(handle, "")


def claim(lock: Path, option: str) -> None:
    """Make this attempt of this job the user of a folder, until `release` or until SLURM says that the job is over.

    Raises ConfigError where a process, another job or a later attempt of this one has it. Earlier attempts lose it.
    """
    me = current_holder()
    with locked(lock, option) as handle:
        refuse_job(read(handle), me, lock, option)
        write(handle, me)


def release(lock: Path) -> None:
    """What ends a claim; nothing where the folder is another's."""
    with locked(lock, str(lock.parent)) as handle:
        if read(handle) == current_holder():
            write(handle, "")


def check_free(lock: Path, option: str) -> None:
    """Raise ConfigError where a process or a job has the folder. Leaves no folder behind."""
    if lock.exists():
        with locked(lock, option) as handle:
            refuse_job(read(handle), None, lock, option)


def note_submitted(lock: Path, job: str) -> None:
    """The folder is the job's from here on, although it has not started; it may just have."""
    with locked(lock, str(lock.parent)) as handle:
        if job_of(read(handle)) is None:
            write(handle, job_name(job, 0))


def taken_over(lock: Path) -> str | None:
    """Who has the folder instead of this process's launcher or job; None while it is theirs."""
    me = current_holder()
    try:
        holder = lock.read_text()
    except OSError:  # a shared file system that stumbles; the next look will tell
        return None
    return holder if me and holder and holder != me else None


def current_holder() -> str | None:
    """The name of the launcher or the job attempt that this process belongs to; None without either."""
    if LAUNCHER_PID in os.environ:
        return process_name(int(os.environ[LAUNCHER_PID]))
    if "SLURM_JOB_ID" not in os.environ:
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    return job_name(job, int(os.environ.get("SLURM_RESTART_COUNT", 0)))


def process_name(pid: int) -> str:
    return f"process {pid} on {os.uname().nodename}"


def job_name(job: str, attempt: int) -> str:
    return f"job {job}, attempt {attempt}"


def job_of(holder: str | None) -> tuple[str, int] | None:
    """(id, attempt) where a job is named."""
    found = re.fullmatch(r"job (\S+), attempt (\d+)", holder or "")
    return (found.group(1), int(found.group(2))) if found else None


def refuse_job(holder: str, me: str | None, lock: Path, option: str) -> None:
    """Raise ConfigError where a file names a job that is not over and not `me`. A process that it names is gone: we have its lock."""
    theirs, mine = job_of(holder), job_of(me)
    if theirs is None:
        return
    if mine is not None and theirs[0] == mine[0]:
        if theirs[1] > mine[1]:
            raise ConfigError(f"{option} is in use by {holder}. This is attempt {mine[1]}, which ends.")
        return
    try:
        state = settled_state(theirs[0])
    except Unknown as error:
        raise ConfigError(
            f"{option} was last used by job {theirs[0]}, and whether that is over cannot be told: {error}. Ask on a machine "
            f"of its cluster; if it is over, remove {lock}."
        ) from error
    if state not in OVER:
        raise ConfigError(
            f"{option} is in use by job {theirs[0]} ({state.lower()}). Wait for it, end it with scancel {theirs[0]}, or choose "
            "another folder."
        )


@contextmanager
def locked(lock: Path, option: str) -> Iterator[int]:
    """Hold the file's lock where its file system has any. Raises ConfigError where a process keeps it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"{option} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        acquire(handle, option)
        yield handle
    finally:
        os.close(handle)


def acquire(handle: int, option: str) -> None:
    deadline = time.monotonic() + BRIEF
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = read(handle)
            if is_alive(holder) or time.monotonic() > deadline:
                raise ConfigError(
                    f"{option} is in use by {holder or 'another process'}. Wait for it, or choose another folder."
                ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return
        time.sleep(0.1)


def is_alive(holder: str) -> bool:
    """Whether the file names a process that runs, as far as can be told from this machine."""
    found = re.fullmatch(r"process (\d+) on (\S+)", holder)
    if found is None or found.group(2) != os.uname().nodename:
        return found is not None
    try:
        os.kill(int(found.group(1)), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def read(handle: int) -> str:
    return os.pread(handle, 256, 0).decode(errors="replace")


def write(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
