"""Whether a job that has ended is to be tried again: yes after a stop with a checkpoint, not for ever after failures."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from piflow_dist.launch.exits import CONTINUED, FINISHED, GAVE_UP, REFUSED, STOPPED
from piflow_dist.launch.failure_record import read_failure
from piflow_dist.tracking.journal import METRICS, read_metrics

log = logging.getLogger(__name__)

TRIES = 3
"""Failures in a row that got no further than the first of them."""
WAIT = 30
"""Seconds before the second try; each further one waits twice as long."""
LONGEST_WAIT = 1800
ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class Decision:
    code: int
    """FINISHED, STOPPED (try again), or what the job ends with."""
    wait: int
    """Seconds before the next try."""
    message: str


def decide(run_dir: Path, job: str, code: int) -> Decision:
    """What is to become of a job whose processes ended with `code`; notes the attempt in the run folder.

    job: its id, which stays the same when it is requeued. Submitting anew starts the count anew.
    """
    step = last_step(run_dir)
    if code == FINISHED:
        return Decision(FINISHED, 0, f"Finished at step {step}.")
    if code in CONTINUED:
        return Decision(STOPPED, 0, f"Stopped at step {step}.")
    if code == REFUSED:
        return Decision(REFUSED, 0, "The request cannot work; the job is not tried again.")
    failure = read_failure(run_dir)
    reason = failure.reason if failure is not None else describe_exit(code)
    note(run_dir, {"job": job, "step": step, "code": code, "reason": reason, "time": time.time()})
    tries = tries_without_progress(attempts(run_dir, job))
    if tries >= TRIES:
        message = f"Failed {tries} times without getting past step {step}: the job is given up. Last reason: {reason}"
        return Decision(GAVE_UP, 0, message)
    wait = min(WAIT * 2 ** (tries - 1), LONGEST_WAIT)
    return Decision(STOPPED, wait, f"Failed after step {step} (failure {tries} of {TRIES} there). {reason}")


def tries_without_progress(failures: list[dict]) -> int:
    """How many of the last failures got no further than the first of them."""
    best, tries = -1, 0
    for failure in failures:
        best, tries = (failure["step"], 1) if failure["step"] > best else (best, tries + 1)
    return tries


def last_step(run_dir: Path) -> int:
    path = run_dir / METRICS
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def note(run_dir: Path, attempt: dict) -> None:
    with open(run_dir / ATTEMPTS, "a") as file:
        file.write(json.dumps(attempt) + "\n")


def attempts(run_dir: Path, job: str) -> list[dict]:
    path = run_dir / ATTEMPTS
    rows = read_metrics(path) if path.exists() else []
    return [row for row in rows if row["job"] == job]


def describe_exit(code: int) -> str:
    """An exit code of srun, which adds 128 to a signal's number."""
    if code > 128:
        return f"A process was ended by signal {code - 128}; the log says which."
    return f"A process ended with exit code {code}; see the logs of the ranks."
