"""What a job died of, as a file of the run folder. Imports no torch: a batch script has seconds to decide what comes next."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from piflow_dist.checkpoint.files import write_atomic

SILENT = "does not answer"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    rank: int
    step: int
    """The step (from 1) that was under way; 0 while the run was being built, and where there are none."""
    phase: str
    """Empty where there are none: in sampling and evaluation."""
    reason: str
    """In a line or two."""
    text: str
    """Traceback, or stacks of all threads, with the reason at the end."""
    others: dict[str, str] = field(default_factory=dict)
    """rank -> "step N, phase" of the other ranks; "does not answer" where they did not say."""

    def describe(self) -> str:
        """For the end of a log: where the others were, the text, and who failed last, as that is read first."""
        places: dict[str, list[str]] = {}
        for rank, place in self.others.items():
            places.setdefault(place, []).append(rank)
        others = "; ".join(f"rank {', '.join(ranks)}: {place}" for place, ranks in places.items())
        where = f" in step {self.step}, {self.phase}" if self.phase else ""
        return f"{self.text.rstrip()}\nRank {self.rank} failed{where}." + (f" The others: {others}." if others else "")


def failure_path(run_dir: Path) -> Path:
    return run_dir / "logs" / "failure.json"


def write_failure(run_dir: Path, failure: Failure) -> None:
    write_atomic(failure_path(run_dir), json.dumps(asdict(failure)))


def write_first_failure(run_dir: Path, failure: Failure) -> None:
    """The same where the processes have no way to tell one another: the first one's stays."""
    path = failure_path(run_dir)
    path.parent.mkdir(exist_ok=True)
    whole = path.with_name(f"failure_{failure.rank}.json")
    write_atomic(whole, json.dumps(asdict(failure)))
    try:
        # Whole or not at all, and only where there is none: this process may be ended at any moment.
        os.link(whole, path)
    except FileExistsError:
        log.info("%s is of a process that failed earlier", path)
    finally:
        whole.unlink()


def read_failure(run_dir: Path) -> Failure | None:
    """What the last attempt died of, where one of its ranks could still say it."""
    path = failure_path(run_dir)
    return Failure(**json.loads(path.read_text())) if path.exists() else None
