"""What a run folder keeps for MLflow. It is the truth; MLflow has a copy, sent when a server takes it.

RUN/metrics.jsonl            a row per step; which of them MLflow has is asked of MLflow
RUN/mlflow_run_id            the MLflow run, as soon as there is one
RUN/tracking/run.json        name, tags, which store, how the training ended: enough to make the MLflow run later
RUN/tracking/outbox/*.json   a file for everything else that is to be sent (late metrics, an artifact, an evaluation); removed when it is there
RUN/tracking/refused/*.json  what MLflow will not have
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import write_atomic

RUN_ID = "mlflow_run_id"
METRICS = "metrics.jsonl"
TRACKING = "tracking"
CLAIMED = "sending_"
TIME = "time"
"""Key of a row: when it was written, in milliseconds since 1970, as MLflow counts. It never changes: a row sent twice is then the same row."""


def now() -> int:
    return int(time.time() * 1000)


def read_run_id(run_dir: Path) -> str | None:
    """The MLflow run of a run folder; None where there is none."""
    path = run_dir / RUN_ID
    return path.read_text().strip() if path.exists() else None


class MetricsFile:
    """One JSON object per step. A resumed run drops the rows that it is about to write again."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.dropped: dict[int, set[str]] = {}
        """Keys of the rows that were dropped, by step: MLflow may have those."""
        if path.exists():
            rows = read_metrics(path)
            self.dropped = {row["step"]: set(row) for row in rows if row["step"] >= first_step}
            kept = [row for row in rows if row["step"] < first_step]
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  (open as long as the run; close() ends it)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut off by a kill is left out."""
    return [row for row, _ in rows_after(path, 0)]


def rows_after(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole rows from byte `offset` on, each with the offset behind it."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if line.strip():
                yield json.loads(line), offset


def read_identity(run_dir: Path) -> dict[str, Any]:
    """run.json; empty where there is none."""
    path = run_dir / TRACKING / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    (run_dir / TRACKING).mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / TRACKING / "run.json", json.dumps(identity, indent=1) + "\n")


def post(run_dir: Path, kind: str, name: str | None = None, **content: Any) -> None:
    """Put something into the outbox: it is on disk when this returns. kind: metrics, row, artifact or evaluation.

    name: of the file; an entry of the same name that has not been sent is replaced.
    """
    folder = run_dir / TRACKING / "outbox"
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"kind": kind, "id": uuid.uuid4().hex, TIME: now(), **content}
    name = name or f"{time.time_ns():020d}_{entry['id'][:8]}"  # sent in the order of their names
    write_atomic(folder / f"{name}.json", json.dumps(entry, indent=1) + "\n")


def post_artifact(run_dir: Path, path: Path, folder: str = "") -> None:
    """The file stays where it is, and is read when it is sent."""
    place = place_in(run_dir, path)
    name = hashlib.blake2b(f"{folder}/{place}".encode(), digest_size=8).hexdigest()
    post(run_dir, "artifact", f"artifact_{name}", path=place, folder=folder)


def post_evaluation(
    run_dir: Path, name: str, values: Mapping[str, float], artifacts: Sequence[Path], step: int | None
) -> None:
    places = [place_in(run_dir, Path(path)) for path in artifacts]
    post(run_dir, "evaluation", title=name, values=dict(values), artifacts=places, step=step)


def outbox(run_dir: Path) -> list[Path]:
    """What is still to be sent; first what a killed process was sending."""
    found = (run_dir / TRACKING / "outbox").glob("*.json")
    return sorted(found, key=lambda path: (not path.name.startswith(CLAIMED), path.name))


def claim(entry: Path) -> Path:
    """Take an entry out of the way of a later one of the same name, which would otherwise be removed with it."""
    return entry if entry.name.startswith(CLAIMED) else entry.rename(entry.with_name(CLAIMED + entry.name))


def place_in(run_dir: Path, path: Path) -> str:
    """Relative to the run folder where it is inside: run folders are moved."""
    path = path.resolve()
    return str(path.relative_to(run_dir.resolve())) if path.is_relative_to(run_dir.resolve()) else str(path)
