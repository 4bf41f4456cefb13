"""Evaluations in MLflow: child runs of the training whose student they measure."""

import logging
import os
from pathlib import Path

from piflow_dist.config import ConfigError, read_config
from piflow_dist.tracking.tracker import METRICS_PER_CALL, read_run_id, tracking_uri

log = logging.getLogger(__name__)


def log_evaluation(run_dir: Path, name: str, values: dict[str, float], artifacts: list[Path]) -> str | None:
    """A child run of the training in run_dir with these metrics and files; its id, or None where the training has no MLflow run.

    A store that cannot be reached is said, and costs the record alone.
    """
    parent = read_run_id(run_dir)
    if parent is None:
        log.warning("%s has no MLflow run: the evaluation is in its report alone", run_dir)
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    try:
        uri = tracking_uri(read_config(run_dir / "config.yaml"))
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_run(parent).info.experiment_id
        child = client.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": parent}).info.run_id
        metrics = [Metric(key, value, 0, 0) for key, value in values.items()]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(child, metrics=metrics[start : start + METRICS_PER_CALL])
        for path in artifacts:
            client.log_artifact(child, str(path), "figures" if path.suffix == ".png" else None)
        client.set_terminated(child)
        return child
    except (MlflowException, ConfigError, OSError) as error:
        log.warning("the evaluation was not recorded in MLflow: %s", error)
        return None
