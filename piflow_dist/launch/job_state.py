"""What SLURM says of a job. Imports nothing heavy: a batch script asks before its training starts."""

import os
import shutil
import subprocess
import time

LIVE_JOBS = "PIFLOW_LIVE_JOBS"
"""Variable: "ID STATE" lines of the user's jobs, from slurm/common.sh for containers, which have no squeue."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "GONE")
OVER = (*ENDED, "NODE_FAIL", "PREEMPTED")
"""Such a job does not go on: one that is put back is PENDING."""
ANSWERS = 20
"""Seconds within which SLURM answers."""
ENDING = 60.0
"""Seconds for a job that is being ended."""


class Unknown(RuntimeError):
    """SLURM cannot be asked; the message says why."""


def job_state(job: str) -> str:
    """RUNNING, PENDING, ...; GONE where SLURM does not know the job any more. job: "12", or "12_3" in an array. Raises Unknown."""
    if shutil.which("squeue") is None:
        if LIVE_JOBS not in os.environ:
            raise Unknown("there is no squeue here")
        return dict(line.split() for line in os.environ[LIVE_JOBS].splitlines()).get(job, "GONE")
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWERS)
    except subprocess.TimeoutExpired as error:
        raise Unknown(f"squeue does not answer within {ANSWERS} s") from error
    if done.returncode == 0:
        return (done.stdout.split() or ["GONE"])[0]
    if "Invalid job id" in done.stderr:
        return "GONE"
    raise Unknown(" ".join(done.stderr.split()) or f"squeue ended with exit code {done.returncode}")


def settled_state(job: str) -> str:
    """job_state, but of a job that is being ended (scancel, a moment ago) what comes of it. Raises Unknown."""
    deadline = time.monotonic() + ENDING
    while (state := job_state(job)) == "COMPLETING" and time.monotonic() < deadline:
        time.sleep(1)
    return state
