"""A run folder's copy in MLflow: made, filled up and kept in step with what is on disk (journal.py).

`sync` may fail at any point and be called again: what was sent before is found out from the store, not from memory. A training is
found by a tag that was on disk before the store heard of it, its steps by the history of the loss (a batch of steps is one
transaction: what the store has of the loss it has of every metric), evaluations by a tag of their own.
"""

import codecs
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import Config, ConfigError, config_values, read_config, require
from piflow_dist.tracking.journal import (
    CLAIMED,
    METRICS,
    RUN_ID,
    TIME,
    TRACKING,
    claim,
    now,
    outbox,
    read_identity,
    read_run_id,
    rows_after,
)
from piflow_dist.tracking.secrets import mask, masked, without_credentials

log = logging.getLogger(__name__)

METRICS_PER_CALL, PARAMS_PER_CALL, PARAM_LENGTH, NAME_LENGTH = 1000, 100, 6000, 250  # MLflow's limits
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
TRAINING, SWEEP, EVALUATION, PARENT = "piflow.training", "piflow.sweep", "piflow.evaluation", "mlflow.parentRunId"
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
TEXT = {".txt", ".md", ".json", ".jsonl", ".yaml", ".yml", ".patch", ".html", ".csv", ".log"}
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""MLflow's own are 120 seconds and seven retries: half an hour before a server counts as away. Here others try again."""


def chosen_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else empty."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""


def store_uri(uri: str, run_dir: Path) -> str:
    """The address of an MLflow store; an SQLite file beside the run folder where it is empty. Raises ConfigError."""
    if not uri:
        return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    scheme = uri.partition(":")[0].partition("+")[0]
    require(
        scheme != "file",
        f"tracking.uri={mask(uri)} (or MLFLOW_TRACKING_URI) is a folder, which MLflow takes no more. Use "
        f"sqlite:///{uri.removeprefix('file:').removeprefix('//').rstrip('/')}/mlflow.db, or leave it out.",
    )
    require(
        scheme in SCHEMES or uri == "databricks",
        f"tracking.uri={mask(uri)} (or MLFLOW_TRACKING_URI) is no MLflow store: it begins with {scheme!r}. Use one of: "
        f"{', '.join(SCHEMES)}.",
    )
    return uri


def artifact_location(uri: str, folder: Path) -> str | None:
    """For an experiment that is made: a server has a place of its own; with others MLflow's is the folder that the command was
    typed in, and this is one in `folder`."""
    served = uri.startswith(("http", "databricks"))
    return None if served else (folder.resolve() / "mlartifacts").as_uri()


def connect(uri: str) -> Any:
    """An MlflowClient that gives up soon. Raises whatever MLflow does where an SQL store cannot be opened."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial database tables"
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # every retry; what fails in the end is told by us
    return mlflow.MlflowClient(tracking_uri=uri)


class Store:
    def __init__(self, run_dir: Path, config: Config | None = None):
        """config: the training's own, which alone chooses a store and begins another MLflow run where its own is gone. Tools
        give none and go where the training went. Raises ConfigError where the run folder cannot be read."""
        self.run_dir, self.is_training = run_dir, config is not None
        self.config = config or read_config(run_dir / "config.yaml")
        self.uri = store_uri(chosen_uri(self.config) if self.is_training else self._known_uri(), run_dir)
        self.client: Any = None
        self.run_id: str | None = None
        self._forget()

    def sync(self, rows_at_once: int = 1_000_000) -> bool:
        """Send what MLflow lacks. False where more than rows_at_once steps wait: call again. Raises what MLflow raises."""
        try:
            if self.run_id is None:
                self._open()
            more = self._send_rows(rows_at_once)
            self._send_status()
            self._send_outbox()
        except BaseException:
            self._forget()
            raise
        return not more

    def _forget(self) -> None:
        """After a failure nobody knows what has arrived: ask again."""
        self.run_id, self.offset, self.present, self.status = None, 0, set(), None

    def _known_uri(self) -> str:
        """Of the training's last start. Its credentials, which are not kept, come from the same variable as then."""
        chosen, known = chosen_uri(self.config), read_identity(self.run_dir).get("uri")
        return chosen if self.config.tracking.uri or known in (None, without_credentials(chosen)) else known

    # The run

    def _open(self) -> None:
        if self.client is None:
            self.client = connect(self.uri)
        identity = read_identity(self.run_dir)
        require(bool(identity), f"{self.run_dir} was not trained with tracking: there is nothing to be sent.")
        self.experiment_id = self._experiment(mask(identity["experiment"]))
        run_id = self._known_run() or self._find(TRAINING, identity["training"]) or self._create(identity)
        if read_run_id(self.run_dir) != run_id:
            write_atomic(self.run_dir / RUN_ID, run_id + "\n")
        self._describe(run_id, identity)
        self.present = {metric.step for metric in self.client.get_metric_history(run_id, "loss")}
        self.run_id = run_id

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        beside = artifact_location(self.uri, self.run_dir.resolve().parent)
        return self.client.create_experiment(name, artifact_location=beside)

    def _known_run(self) -> str | None:
        """The MLflow run that this run folder belongs to, if the store has it."""
        from mlflow.entities import LifecycleStage
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        run_id = read_run_id(self.run_dir)
        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
            if run.info.lifecycle_stage == LifecycleStage.ACTIVE:
                self.experiment_id = run.info.experiment_id  # of before, where tracking.experiment was changed
                return run_id
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
        require(
            self.is_training,
            f"MLflow run {run_id} of {self.run_dir} is not in {mask(self.uri)}, or deleted there. Only a training may begin "
            "another one: start it again, or set tracking.uri in its config.yaml to the store that has the run.",
        )
        log.warning(
            "MLflow run %s is not in %s, or deleted there: this training goes on as a new run", run_id, mask(self.uri)
        )
        return None

    def _find(self, tag: str, value: str) -> str | None:
        """The oldest run with a tag."""
        escaped = value.replace("'", "\\'")
        found = self.client.search_runs([self.experiment_id], f"tags.`{tag}` = '{escaped}'")
        return min(found, key=lambda run: (run.info.start_time, run.info.run_id)).info.run_id if found else None

    def _create(self, identity: Mapping[str, Any]) -> str:
        tags = {TRAINING: identity["training"]}
        return self.client.create_run(
            self.experiment_id, start_time=identity["started"], tags=tags, run_name=mask(identity["name"])
        ).info.run_id

    def _describe(self, run_id: str, identity: Mapping[str, Any]) -> None:
        """Settings and surroundings. The first settings stay, as MLflow's parameters cannot change; config.yaml follows."""
        from mlflow.entities import Param, RunTag

        run = self.client.get_run(run_id)
        tags = {key: mask(str(value)) for key, value in identity["tags"].items()}
        if identity.get("sweep"):
            tags[PARENT] = self._sweep(mask(identity["sweep"]))
        changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        params = flatten(masked(config_values(self.config)))
        missing = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in params if key not in run.data.params]
        if changed:
            self.client.log_batch(run_id, tags=changed)
        for start in range(0, len(missing), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=missing[start : start + PARAMS_PER_CALL])

    def _sweep(self, folder: str) -> str:
        """The run that the trainings of a sweep have in common; the first one to arrive makes it."""
        if (found := self._find(SWEEP, folder)) is None:
            run = self.client.create_run(self.experiment_id, tags={SWEEP: folder}, run_name=Path(folder).name)
            self.client.set_terminated(run.info.run_id)  # nothing runs in it
            found = self._find(SWEEP, folder)  # of two that were made at once all choose the same
            if found != run.info.run_id:
                self.client.delete_run(run.info.run_id)
        return found

    # What is sent

    def _send_rows(self, limit: int) -> bool:
        """The steps that the store lacks, in their order, whole steps in each call. Whether there are more than `limit`."""
        path = self.run_dir / METRICS
        waiting, taken, size = [], 0, 0
        for row, offset in rows_after(path, self.offset) if path.exists() else ():
            if row["step"] in self.present:
                if not waiting:
                    self.offset = offset
                continue
            if taken == limit:
                self._flush(waiting)
                return True
            if size + len(row) > METRICS_PER_CALL and waiting:
                self._flush(waiting)
                waiting, size = [], 0
            waiting.append((row, offset))
            taken, size = taken + 1, size + len(row)
        self._flush(waiting)
        return False

    def _flush(self, rows: list[tuple[dict[str, Any], int]]) -> None:
        from mlflow.entities import Metric

        if not rows:
            return
        metrics = [metric for row, _ in rows for metric in metrics_of(Metric, row)]
        self.client.log_batch(self.run_id, metrics=metrics)
        self.present |= {row["step"] for row, _ in rows}
        self.offset = rows[-1][1]

    def _send_outbox(self) -> None:
        """One entry that does not arrive keeps no other one from it; the first error is raised at the end."""
        first_error = None
        for path in outbox(self.run_dir):
            claimed = claim(path)
            try:
                self._send_entry(json.loads(claimed.read_text()))
                claimed.unlink()
            except Exception as error:
                run = self.client.get_run(self.run_id)  # raises where the store is away: it would take no other entry
                if not is_refusal(error) or run.info.lifecycle_stage != "active":
                    first_error = first_error or error
                    continue
                refused = self.run_dir / TRACKING / "refused" / claimed.name.removeprefix(CLAIMED)
                refused.parent.mkdir(exist_ok=True)
                claimed.rename(refused)
                log.error("MLflow refuses what is now in %s: %s", refused, mask(str(error)))
        if first_error is not None:
            raise first_error

    def _send_entry(self, entry: Mapping[str, Any]) -> None:
        match entry["kind"]:
            case "metrics":
                self._send_late(entry)
            case "row":
                self._complete_row(entry)
            case "artifact":
                self._upload(self.run_id, entry["path"], entry["folder"])
            case "evaluation":
                self._send_evaluation(entry)

    def _send_late(self, entry: Mapping[str, Any]) -> None:
        """More of a step that has its row already."""
        from mlflow.entities import Metric

        first = metric_name(next(iter(entry["values"])))
        if any(metric.timestamp == entry[TIME] for metric in self.client.get_metric_history(self.run_id, first)):
            return
        row = {"step": entry["step"], TIME: entry[TIME], **entry["values"]}
        self.client.log_batch(self.run_id, metrics=list(metrics_of(Metric, row)))

    def _complete_row(self, entry: Mapping[str, Any]) -> None:
        """What MLflow lacks of a step that was done again: all of it is there if the row itself was sent."""
        from mlflow.entities import Metric

        row = {"step": entry["step"], TIME: entry[TIME], **entry["values"]}
        lacking = [
            metric
            for metric in metrics_of(Metric, row)
            if entry["step"] not in {known.step for known in self.client.get_metric_history(self.run_id, metric.key)}
        ]
        for batch in batches(lacking):
            self.client.log_batch(self.run_id, metrics=batch)

    def _send_evaluation(self, entry: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        run_id = self._find(EVALUATION, entry["id"])
        if run_id is None:
            tags = {EVALUATION: entry["id"], PARENT: self.run_id}
            run_id = self.client.create_run(self.experiment_id, entry[TIME], tags, mask(entry["title"])).info.run_id
        present = self.client.get_run(run_id).data.metrics
        values = {key: value for key, value in entry["values"].items() if metric_name(key) not in present}
        row = {"step": entry["step"] or 0, TIME: entry[TIME], **values}
        for batch in batches(list(metrics_of(Metric, row))):
            self.client.log_batch(run_id, metrics=batch)
        for place in entry["artifacts"]:
            self._upload(run_id, place, "")
        self.client.set_terminated(run_id)

    def _upload(self, run_id: str, place: str, folder: str) -> None:
        path = self.run_dir / place  # an absolute place stays what it is
        if not path.exists():
            log.warning("%s is gone before it could be sent to MLflow; it is left out", path)
            return
        if path.is_dir():
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                self._upload(run_id, str(file), str(Path(folder, path.name, file.parent.relative_to(path))))
        elif (text := read_text(path)) is not None and (shown := mask(text)) != text:
            self.client.log_text(run_id, shown, str(Path(folder) / path.name))
        else:
            self.client.log_artifact(run_id, str(path), folder or None)

    def _send_status(self) -> None:
        identity = read_identity(self.run_dir)
        if identity["status"] == self.status:
            return
        if identity["status"] == "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.client.set_terminated(self.run_id, identity["status"], identity.get("ended"))
        self.status = identity["status"]


def metrics_of(metric: type, row: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in row.items():
        if key not in ("step", TIME):
            yield metric(metric_name(key), float(value), row.get(TIME) or now(), row["step"])


def metric_name(key: str) -> str:
    """As MLflow takes it: letters, digits, _ - . : / and spaces, as a relative path. Names of sweeps' folders have others."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", key)).lstrip("./")[:NAME_LENGTH] or "_"


def is_refusal(error: Exception) -> bool:
    """Whether MLflow was reached and would say the same again."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def read_text(path: Path) -> str | None:
    """Of a file that is UTF-8, or is called a text; None for others, of which the first piece alone is read as a rule."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if path.suffix in TEXT else "strict")
    pieces = []
    with open(path, "rb") as file:
        try:
            while piece := file.read(1 << 20):
                pieces.append(decoder.decode(piece))
            return "".join([*pieces, decoder.decode(b"", final=True)])
        except UnicodeDecodeError:
            return None


def batches(metrics: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(metrics), METRICS_PER_CALL):
        yield metrics[start : start + METRICS_PER_CALL]


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted keys."""
    rows = []
    for key, value in values.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def open_store(run_dir: Path) -> Store:
    """For tools. Raises ConfigError where the folder is of no run."""
    require((run_dir / "config.yaml").is_file(), f"{run_dir} is no run folder: it has no config.yaml.")
    try:
        return Store(run_dir)
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be read: {error}") from error
