"""mlflow=true: the contact sheet and the manifest in the MLflow run of the training that the images are of, as a child run."""

import logging
import os
from pathlib import Path

from piflow_dist.sampling.gather import CONTACT_SHEET, FAILURES, MANIFEST, META
from piflow_dist.sampling.settings import SampleRequest
from piflow_dist.tracking.tracker import read_run_id, tracking_uri

log = logging.getLogger(__name__)


def publish(request: SampleRequest) -> None:
    """A store that cannot be reached costs the upload, not the images."""
    run_dir = request.checkpoint.resolve().parents[1]
    run_id = read_run_id(run_dir)
    if run_id is None:
        log.warning("mlflow=true: %s has no MLflow run. Nothing is uploaded.", run_dir)
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    client = mlflow.MlflowClient(tracking_uri=tracking_uri(request.run))
    try:
        parent = client.get_run(run_id)
        tags = {MLFLOW_PARENT_RUN_ID: run_id}
        child = client.create_run(
            parent.info.experiment_id, run_name=f"samples {request.out.name}", tags=tags
        ).info.run_id
        for key, value in request.settings().items():
            client.log_param(child, key, value)
        for path in existing(request.out):
            client.log_artifact(child, str(path), "samples")
        client.set_terminated(child)
    except MlflowException as error:
        log.warning("mlflow=true: %s cannot take the samples: %s", tracking_uri(request.run), error)


def existing(out: Path) -> list[Path]:
    return [out / name for name in (CONTACT_SHEET, MANIFEST, FAILURES, META) if (out / name).exists()]
