"""Log an exported student as an MLflow model, and register it by name."""

import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from piflow_dist.config import ConfigError, require
from piflow_dist.tracking.journal import read_run_id
from piflow_dist.tracking.secrets import mask
from piflow_dist.tracking.store import artifact_location, open_store, store_uri

CODE = Path(__file__).with_name("pyfunc_model.py")


@dataclass(kw_only=True)
class RegisterOptions:
    name: str = MISSING
    """Of the registered model; a new version of it where there is one."""
    dataset: str = MISSING
    """Prepared data whose codec, prompt encoder and latent size are used; kept as a place."""
    base: str | None = None
    """The transformer under an adapter; kept as a place."""
    run: str | None = None
    """Run folder of the training, in whose MLflow run the model appears."""
    uri: str | None = None
    """MLflow store; default: that of `run`, else MLFLOW_TRACKING_URI."""
    device: str = "auto"
    batch_size: int = 16


def register(source: str, options: RegisterOptions) -> str:
    """What was made, in a sentence. Raises ConfigError where source is no exported student, or no store answers."""
    from piflow_dist.models.adapters import student_folder
    from piflow_dist.sampling.settings import SampleConfig, resolve_source

    for name in ("dataset", "base"):
        place = getattr(options, name)
        require(
            place is None or mask(place) == place,
            f"{name}={mask(place or '')} holds a secret, and the model keeps the place as it is. Give it without, and the "
            "secret by an environment variable.",
        )
    require(
        student_folder(source) is not None,
        f"{source} is no exported student. Write one with tools/export.py source=RUN out={source}_export.",
    )
    resolve_source(SampleConfig(source=source, base=options.base, dataset=options.dataset, out="unused"))
    store = open_store(Path(options.run)) if options.run else None
    uri = options.uri or (store.uri if store else os.environ.get("MLFLOW_TRACKING_URI"))
    require(bool(uri), "Say which MLflow store: run=RUN, uri=URI or MLFLOW_TRACKING_URI.")
    uri = store_uri(uri, Path(source))
    run_id = read_run_id(Path(options.run)) if options.run else None
    require(
        run_id is not None or not options.run,
        f"run={options.run} has no MLflow run yet. Send it first: tools/track.py sync {options.run}.",
    )
    try:
        return log_model(source, options, uri, run_id)
    except ConfigError:
        raise
    except Exception as error:  # whatever MLflow, requests or a database driver raise
        raise ConfigError(
            f"MLflow (uri={mask(uri)}) did not take the model: {mask(str(error)).splitlines()[0]}"
        ) from error


def log_model(source: str, options: RegisterOptions, uri: str, run_id: str | None) -> str:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    mlflow.set_tracking_uri(uri)
    settings = {
        "base": None if options.base is None else str(Path(options.base).resolve()),
        "dataset": options.dataset if "://" in options.dataset else str(Path(options.dataset).resolve()),
        "device": options.device,
        "batch_size": options.batch_size,
    }
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed", required=False)]),
        outputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "png")]),
        params=ParamSchema([ParamSpec("nfe", "long", 0)]),
    )
    if run_id is None:
        experiment = mlflow.get_experiment_by_name("piflow_dist")
        folder = Path(uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else source).resolve().parent
        chosen = (
            experiment.experiment_id
            if experiment
            else mlflow.create_experiment("piflow_dist", artifact_location=artifact_location(uri, folder))
        )
        running = mlflow.start_run(experiment_id=chosen, run_name=options.name)
    else:
        before = mlflow.MlflowClient().get_run(run_id).info
        running = mlflow.start_run(run_id=run_id)
    with running as run:
        logged = mlflow.pyfunc.log_model(
            name="student",
            python_model=str(CODE),
            artifacts={"student": str(Path(source).resolve())},
            model_config=settings,
            signature=signature,
            pip_requirements=["piflow_dist"],  # of this checkout: it is in no registry
            registered_model_name=options.name,
        )
    if run_id is not None:  # the context ends the run, as if it had been its own
        client = mlflow.MlflowClient()
        if before.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, before.status, before.end_time)
    version = logged.registered_model_version
    return (
        f"Model {options.name}, version {version}: models:/{options.name}/{version}, in MLflow run {run.info.run_id}."
    )
