"""One launch of a training as a process of its own, watched from outside and killed: for tools/chaos.py.

Processes are found and followed through /proc, and killed by their ids: Linux only.
"""

import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from piflow_dist.checkpoint.phases import DELAY_VARIABLE, FOLDER_VARIABLE
from piflow_dist.tracking.journal import METRICS, read_metrics

LAUNCH = Path(__file__).parents[2] / "tools" / "launch.py"
POLL = 0.001


@dataclass
class Aim:
    """When and whom to kill. moment: start, step or a phase of a save."""

    moment: str
    count: int
    """Of steps, or of saves, that the life may begin before."""
    delay: float
    """Seconds after the moment was seen."""
    victim: int
    """A rank; -1: the launcher."""


class Life:
    """A running `tools/launch.py arguments`."""

    def __init__(self, arguments: list[str], run_dir: Path, log: Path, fork: bool, save_delay: float):
        """fork: a copy of this process, which has the imports done, calls the tool; else a new interpreter runs it."""
        self.run_dir, self.log = run_dir, log
        self.phases = run_dir.parent / "phases"
        self.phases.mkdir(exist_ok=True)
        for old in self.phases.iterdir():
            old.unlink()
        self.first_step = self.step()
        environment = {FOLDER_VARIABLE: str(self.phases), DELAY_VARIABLE: str(save_delay)}
        arguments = [*arguments, f"run_dir={run_dir}"]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            become(arguments, log, fork, environment)
        self.known = {self.pid}
        self.exit_code: int | None = None

    def step(self) -> int:
        path = self.run_dir / METRICS
        rows = read_metrics(path) if path.exists() else []
        return rows[-1]["step"] if rows else 0

    def saves(self) -> set[tuple[int, str]]:
        """(step, phase) that ranks are in, or were in last."""
        found = set()
        for path in self.phases.iterdir():
            words = path.read_text().split()
            if len(words) == 3:  # else it is being written
                found.add((int(words[1]), words[2]))
        return found

    def workers(self) -> list[int]:
        """Process ids in order of rank: the launcher starts them in it."""
        try:
            found = [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            found = []
        self.known |= set(found)
        return found

    def ended(self) -> bool:
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def wait_for(self, reached: Callable[[], bool], limit: float) -> bool:
        """False where the life ended before."""
        deadline = time.monotonic() + limit
        while not reached():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.run_dir} did not come further within {limit:.0f} s. Log: {self.log}.")
            time.sleep(POLL)
        return True

    def kill(self, aim: Aim, limit: float) -> str | None:
        """Wait for the moment and send SIGKILL; who was hit ("rank 1", "launcher"), None where the life ended before."""
        seen: set[int] = set()

        def in_save() -> bool:
            seen.update(step for step, phase in self.saves() if phase == aim.moment)
            return len(seen) > aim.count

        reached = {"start": lambda: True, "step": lambda: self.step() > self.first_step + aim.count}
        if not self.wait_for(reached.get(aim.moment, in_save), limit):
            return None
        time.sleep(aim.delay)
        workers = self.workers()
        if self.ended():
            return None
        alive = aim.victim in range(len(workers))
        try:
            os.kill(workers[aim.victim] if alive else self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return f"rank {aim.victim}" if alive else "launcher"

    def wait(self, limit: float) -> int:
        """Exit code of the launcher, when it and all its workers are gone: two lives must not share a folder."""

        def gone() -> bool:
            self.workers()
            return self.ended() and not any(is_running(pid) for pid in self.known)

        deadline = time.monotonic() + limit
        while not gone():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Processes of {self.run_dir} did not end within {limit:.0f} s. Log: {self.log}.")
            time.sleep(POLL)
        return self.exit_code

    def stop(self) -> None:
        for pid in (*self.workers(), self.pid):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self.ended()


def become(arguments: list[str], log: Path, fork: bool, environment: dict[str, str]) -> None:
    """In the new process: a session of its own, output to the log, then the tool; never returns."""
    code = 1
    try:
        os.setsid()  # Ctrl-C is for the one who watches
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= environment
        if not fork:
            os.execv(sys.executable, [sys.executable, str(LAUNCH), *arguments])
        from piflow_dist.cli import run_tool

        random.seed()  # or all copies would draw the same names for temporary files
        spec = importlib.util.spec_from_file_location("launch_tool", LAUNCH)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        run_tool(tool.launch, arguments, "")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
