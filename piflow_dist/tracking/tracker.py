"""One MLflow run per training and a metrics.jsonl beside it; rank 0 only.

metrics.jsonl holds every step and is the truth; MLflow gets the same rows in batches of tracking.log_every steps.
"""

import json
import logging
import os
import shlex
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import Config
from piflow_dist.launch.console import program

log = logging.getLogger(__name__)

RUN_ID = "mlflow_run_id"
METRICS = "metrics.jsonl"
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits


def tracking_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else an SQLite file beside the run folder."""
    database = Path(config.run_dir).resolve().parent / "mlflow.db"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


def ui_command(uri: str) -> str:
    """The command that opens the store in a browser."""
    return (
        f"{program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
        if not uri.startswith("http")
        else f"open {uri}"
    )


def read_run_id(run_dir: Path) -> str | None:
    """The MLflow run of a run folder; None where there is none."""
    path = run_dir / RUN_ID
    return path.read_text().strip() if path.exists() else None


class MetricsFile:
    """One JSON object per step. A resumed run drops the rows that it is about to write again."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] < first_step]
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  (open as long as the run; close() ends it)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut off by a kill is left out."""
    lines = path.read_text().split("\n")
    complete = [line for line in lines[:-1] if line]
    return [json.loads(line) for line in complete]


class Tracker:
    """Writes every step to metrics.jsonl and, where tracking.enabled, to MLflow."""

    def __init__(self, config: Config, first_step: int, world_size: int):
        """first_step: the step (from 1) that the training is about to take."""
        self.run_dir = Path(config.run_dir)
        self.every = config.tracking.log_every
        self.rows: list[dict[str, Any]] = []
        self.metrics_file = MetricsFile(self.run_dir / METRICS, first_step)
        self.client, self.run_id = None, None
        if config.tracking.enabled:
            self._open_run(config, world_size)

    def _open_run(self, config: Config, world_size: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        uri = tracking_uri(config)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial database tables"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            # Beside the database: artifacts must not land in whatever folder the command was typed in.
            artifacts = (self.run_dir.resolve().parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
            experiment_id = self.client.create_experiment(config.tracking.experiment, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        self.run_id = self._interrupted_run(uri) if config.checkpoint.resume else None
        if self.run_id is not None:
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(experiment_id, run_name=self.run_dir.name).info.run_id
            write_atomic(self.run_dir / RUN_ID, self.run_id + "\n")
        self._describe_run(config, world_size)
        # A batch of steps is one transaction: what the store has of the loss it has of every metric.
        history = self.client.get_metric_history(self.run_id, "loss")
        self.last_logged = max((metric.step for metric in history), default=0)

    def _describe_run(self, config: Config, world_size: int) -> None:
        """Settings and surroundings. The first settings stay, as MLflow's parameters cannot change; config.yaml follows."""
        import torch  # here, as batch scripts read metrics and have no time for it
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        values = flatten(OmegaConf.to_container(OmegaConf.structured(config)))
        missing = [Param(key, str(value)) for key, value in values if key not in known]
        for start in range(0, len(missing), PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=missing[start : start + PARAMS_PER_CALL])
        self.client.log_artifact(self.run_id, str(self.run_dir / "config.yaml"))
        self.client.set_tag(self.run_id, "world_size", world_size)
        self.client.set_tag(self.run_id, "torch", torch.__version__)

    def _interrupted_run(self, uri: str) -> str | None:
        """The MLflow run that this run folder belongs to, if the store has it."""
        from mlflow.entities import LifecycleStage
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        run_id = read_run_id(self.run_dir)
        if run_id is None:
            return None
        try:
            if self.client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE:
                return run_id
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
        log.warning("MLflow run %s is not in %s, or deleted there: this training goes on as a new run", run_id, uri)
        return None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record step (from 1)."""
        row = {"step": step, **values}
        self.metrics_file.write(row)
        self.rows.append(row)
        if len(self.rows) >= self.every:
            self.flush()

    def log_late(self, step: int, values: dict[str, float]) -> None:
        """More of a step that has its row already: what is known when its checkpoint is complete goes to MLflow alone."""
        self.flush()
        if values and self.client is not None:
            self._send([{"step": step, **values}])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file to the run."""
        if self.client is not None:
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def flush(self) -> None:
        """Send what is waiting. Steps that a killed run had already sent are not sent twice."""
        rows = [row for row in self.rows if row["step"] > self.last_logged] if self.client is not None else []
        if rows:
            self._send(rows)
            self.last_logged = rows[-1]["step"]
        self.rows = []

    def _send(self, rows: list[dict[str, Any]]) -> None:
        """In as few calls as MLflow takes, whole steps in each."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows_per_call = max(1, METRICS_PER_CALL // max(len(row) - 1 for row in rows))
        for start in range(0, len(rows), rows_per_call):
            metrics = [
                Metric(key, float(value), now, row["step"])
                for row in rows[start : start + rows_per_call]
                for key, value in row.items()
                if key != "step"
            ]
            self.client.log_batch(self.run_id, metrics=metrics)

    def close(self, status: str) -> None:
        """status: FINISHED or FAILED."""
        self.flush()
        self.metrics_file.close()
        if self.client is not None:
            self.client.set_terminated(self.run_id, status)


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted keys."""
    rows = []
    for key, value in values.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows
