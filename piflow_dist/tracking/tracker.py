"""One MLflow run per training; rank 0 only. Training writes to disk (journal.py), a thread copies to MLflow (store.py).

Training never waits for MLflow: a server that is away, slow or silent costs it a line in the log. What could not be sent is sent
when the server is back, when the training is next started, or by tools/track.py sync.
"""

import getpass
import logging
import os
import shlex
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from piflow_dist.config import Config, ConfigError
from piflow_dist.launch.console import program
from piflow_dist.launch.lock import only_user
from piflow_dist.tracking.describe import write_description
from piflow_dist.tracking.journal import (
    METRICS,
    RUN_ID,
    TIME,
    TRACKING,
    MetricsFile,
    now,
    post,
    post_artifact,
    post_evaluation,
    read_identity,
    read_metrics,
    read_run_id,
    write_identity,
)
from piflow_dist.tracking.lineage import write_lineage
from piflow_dist.tracking.secrets import mask, without_credentials
from piflow_dist.tracking.store import Store, chosen_uri, open_store, store_uri

__all__ = [
    "METRICS",
    "RUN_ID",
    "Tracker",
    "log_evaluation",
    "read_metrics",
    "read_run_id",
    "tracking_uri",
    "ui_command",
]

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 200
"""Of a backlog: after each such portion the outbox is sent, which need not wait for the whole of it."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds between attempts to reach a store that does not answer: twice as long each time."""
IDLE = 30.0
"""Seconds after which the outbox is looked at: other processes (evaluations) post there, too."""


def tracking_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else an SQLite file beside the run folder."""
    return store_uri(chosen_uri(config), Path(config.run_dir))


def ui_command(uri: str) -> str:
    """The command that opens the store in a browser. Passwords are left out: put them in yourself."""
    uri = mask(uri)
    return (
        f"{program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
        if not uri.startswith("http")
        else f"open {uri}"
    )


class Tracker:
    """Writes every step to metrics.jsonl and, where tracking.enabled, keeps MLflow's copy up to date in a thread."""

    def __init__(self, config: Config, first_step: int, world_size: int):
        """first_step: the step (from 1) that the training is about to take."""
        self.run_dir = Path(config.run_dir)
        self.every, self.patience = config.tracking.log_every, config.tracking.patience_seconds
        self.waiting = 0
        self.metrics_file = MetricsFile(self.run_dir / METRICS, first_step)
        self.sender: Sender | None = None
        if config.tracking.enabled:
            write_identity(self.run_dir, describe_run(config, first_step, world_size))
            store = Store(self.run_dir, config)
            # Here, not in the thread: worker processes of the data stream are forked, and an import that is under way in
            # another thread is under way in them for ever.
            connect_modules()
            self.sender = Sender(store)
            self.sender.start()
            self._wake()
            if store.uri.startswith("sqlite"):
                # A file, not a server: making its tables takes seconds once, and the first checkpoint should know the run.
                self.flush(self.patience)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record step (from 1)."""
        row = {"step": step, **values, TIME: now()}
        self.metrics_file.write(row)
        # MLflow may have the row of before a kill, and takes no other: saves are complete at other steps now.
        before = self.metrics_file.dropped.pop(step, row.keys())
        if more := {key: value for key, value in row.items() if key not in before}:
            self._post(post, "row", step=step, values=more, **{TIME: row[TIME]})
        self.waiting += 1
        if self.waiting >= self.every:
            self.waiting = 0
            self._wake()

    def log_late(self, step: int, values: Mapping[str, float]) -> None:
        """More of a step that has its row already: what is known when its checkpoint is complete goes to MLflow alone."""
        if values:
            self._post(post, "metrics", step=step, values=dict(values))
            self._wake()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file, or all files of a folder, which stay where they are until then. Returns at once."""
        self._post(post_artifact, path, folder)
        self._wake()

    def log_evaluation(
        self, name: str, values: Mapping[str, float], artifacts: Sequence[Path] = (), step: int | None = None
    ) -> None:
        """A child run of the training's with values and files. Returns at once."""
        self._post(post_evaluation, name, values, artifacts, step)
        self._wake()

    def checkpoints_changed(self) -> None:
        """A save is complete: which checkpoint came from which is written anew, by the thread."""
        if self.sender is not None:
            self.sender.lineage_is_old = True
            self._wake()

    def flush(self, patience: float) -> bool:
        """Wait until MLflow has all there is now, `patience` seconds at most. Whether it has."""
        return self.sender is None or self.sender.finish(patience)

    def close(self, status: str) -> None:
        """status: FINISHED, FAILED or SCHEDULED (MLflow's word for a run that is to go on)."""
        self.metrics_file.close()
        if self.sender is None:
            return
        write_identity(self.run_dir, read_identity(self.run_dir) | {"status": status, "ended": now()})
        self.sender.lineage_is_old = True
        if not self.sender.finish(self.patience, last=True):
            log.warning(
                "MLflow has not got everything yet. `%s tools/track.py sync %s` sends the rest; so does the next start.",
                *(program("python"), self.run_dir),
            )

    def _post(self, put: Callable[..., None], *content: Any, **named: Any) -> None:
        """Into the outbox. A full disk costs this, and not the training."""
        if self.sender is None:
            return
        try:
            put(self.run_dir, *content, **named)
        except OSError as error:
            log.error("%s takes nothing more for MLflow: %s. Training goes on; this is lost.", self.run_dir, error)

    def _wake(self) -> None:
        if self.sender is not None:
            self.sender.wake.set()


class Sender(threading.Thread):
    """Copies the journal to MLflow whenever it is woken, and tries again by itself after a failure."""

    def __init__(self, store: Store):
        super().__init__(name="tracking", daemon=True)
        self.store = store
        self.wake, self.urgent = threading.Event(), threading.Event()
        """There is something to be sent; somebody waits for it, and pauses are over."""
        self.lineage_is_old = True
        self.sent = threading.Condition()
        self.asked, self.answered, self.reached = 0, 0, True
        """Requests to be told when all is sent; how many of them were answered, and whether the last attempt succeeded."""
        self.ending = False

    def run(self) -> None:
        pause, described, locked = 0.0, False, False
        while True:
            if pause:
                self.urgent.wait(timeout=pause)
            else:
                self.wake.wait(timeout=IDLE)
            self.wake.clear()
            self.urgent.clear()
            asked, last = self.asked, self.ending
            try:
                with only_user(self.store.run_dir / TRACKING / ".lock", f"tracking of {self.store.run_dir}"):
                    if not described:
                        write_description(self.store.run_dir)
                        described = True
                    if self.lineage_is_old:
                        self.lineage_is_old = False  # first: a save may be completed meanwhile
                        write_lineage(self.store.run_dir)
                    while not self.store.sync(ROWS_AT_ONCE):
                        pass
                if pause:
                    log.info("MLflow (%s) has everything again", mask(self.store.uri))
                pause, locked = 0.0, False
            except ConfigError as error:  # tools/track.py sync is at work
                log.debug("%s", error)
                pause, locked = FIRST_PAUSE, True
            except Exception as error:  # whatever MLflow, requests or a database driver raise
                if not pause or locked:
                    log.warning(
                        "MLflow (%s) cannot be reached: %s. Training goes on; metrics are kept in %s and sent later.",
                        *(mask(self.store.uri), describe_error(error), self.store.run_dir / METRICS),
                    )
                pause, locked = min(max(2 * pause, FIRST_PAUSE), LONGEST_PAUSE), False
            with self.sent:
                self.reached = not pause
                if not pause or not locked:
                    self.answered = asked
                self.sent.notify_all()
            if last and not locked:
                return

    def finish(self, patience: float, last: bool = False) -> bool:
        """Ask for an attempt now and wait for its end. last: the thread ends with it."""
        if not self.is_alive():
            return self.reached and self.answered == self.asked
        with self.sent:
            self.asked += 1
            self.ending |= last
            wanted = self.asked
        self.urgent.set()
        self.wake.set()
        with self.sent:
            self.sent.wait_for(lambda: self.answered >= wanted, patience)
            return self.reached and self.answered >= wanted


def connect_modules() -> None:
    """Import what the thread will use."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.entities
    import mlflow.store.tracking.rest_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def describe_run(config: Config, first_step: int, world_size: int) -> dict[str, Any]:
    """run.json. It stays the same training's where it goes on, and is another's with checkpoint.resume=false."""
    from piflow_dist.version import code_version

    run_dir = Path(config.run_dir)
    before = read_identity(run_dir)
    if config.checkpoint.resume is False and first_step == 1:
        before = {}
        (run_dir / RUN_ID).unlink(missing_ok=True)
    tp = config.parallel.tp
    cluster = config.cluster
    code = code_version()
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "piflow_dist.train",
        "mlflow.source.type": "LOCAL" if cluster is None else "JOB",
        "world_size": world_size,
        "parallel": f"dp {world_size // tp} x tp {tp}",
        "cluster": "this machine" if cluster is None else f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}",
        "host": socket.gethostname(),
        "code": code,
        "run_dir": str(run_dir.resolve()),
        "starts": before.get("tags", {}).get("starts", 0) + 1,
    }
    if " " in code:  # else there is no checkout
        tags["mlflow.source.git.commit"] = code.split()[-1].rstrip("+")
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job"] = job
    return {
        "training": before.get("training", uuid.uuid4().hex),
        "name": run_dir.resolve().name,
        "experiment": config.tracking.experiment,
        "sweep": config.tracking.sweep,
        "started": before.get("started", now()),
        "tags": tags,
        "uri": without_credentials(chosen_uri(config)),  # empty: beside the run folder, wherever that is moved
        "status": "RUNNING",
    }


def describe_error(error: Exception) -> str:
    """Its last line of text, which names the cause where requests wrap one another."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return mask(lines[0])[:300]


def log_evaluation(
    run_dir: Path,
    name: str,
    values: Mapping[str, float],
    artifacts: Sequence[Path] = (),
    step: int | None = None,
) -> bool:
    """Record an evaluation of a training's run folder as a child of its MLflow run: values, and files or folders.

    On disk when this returns, and in MLflow if that could be reached (else False: the training's own thread, its next start or
    tools/track.py sync sends it). step: of the evaluated checkpoint.
    Raises ConfigError where run_dir is no run folder; returns False where it was trained without tracking.
    """
    store = open_store(run_dir)
    if not read_identity(run_dir):
        log.warning("%s was trained with tracking.enabled=false: %s is not recorded in MLflow", run_dir, name)
        return False
    post_evaluation(run_dir, name, values, artifacts, step)
    try:
        with only_user(run_dir / TRACKING / ".lock", f"tracking of {run_dir}"):
            store.sync()
        return True
    except ConfigError as error:  # the training lives, and sends it; or the store has lost the training's run
        log.warning("%s waits in %s: %s", name, run_dir / TRACKING / "outbox", error)
        return False
    except Exception as error:  # whatever MLflow, requests or a database driver raise
        log.warning(
            "MLflow (%s) cannot be reached: %s. `tools/track.py sync %s` sends %s later.",
            *(mask(store.uri), describe_error(error), run_dir, name),
        )
        return False
