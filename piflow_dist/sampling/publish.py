"""mlflow=true: the contact sheet and the manifest as a child run of the training that the images are of."""

import logging

from piflow_dist.sampling.gather import CONTACT_SHEET, FAILURES, MANIFEST, META
from piflow_dist.sampling.settings import SampleRequest
from piflow_dist.tracking.tracker import log_evaluation

log = logging.getLogger(__name__)


def publish(request: SampleRequest) -> None:
    """A store that cannot be reached gets them later; settings are in meta.json."""
    run_dir, out = request.checkpoint.resolve().parents[1], request.out
    if not (run_dir / "config.yaml").is_file():
        log.warning("mlflow=true: %s is no checkpoint of a run folder. Nothing is recorded.", request.checkpoint)
        return
    files = [out / name for name in (CONTACT_SHEET, MANIFEST, FAILURES, META) if (out / name).exists()]
    log_evaluation(run_dir, f"samples {out.name}", {}, files)
