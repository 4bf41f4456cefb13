"""An evaluation from its settings to its report: sample, measure over all processes, write, record."""

import json
import logging
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import read_json
from piflow_dist.config import save_config
from piflow_dist.evaluation.compare import RESULT
from piflow_dist.evaluation.comparison import Paths, tracked_values, write_comparison
from piflow_dist.evaluation.samples import EvaluationError, open_samples
from piflow_dist.evaluation.settings import EvaluateConfig, sample_settings
from piflow_dist.launch.local import WorkerFailed, run_workers
from piflow_dist.launch.lock import only_user
from piflow_dist.sampling.gather import FAILURES, META
from piflow_dist.sampling.run import sample
from piflow_dist.sampling.settings import SampleConfig, build_request
from piflow_dist.tracking.journal import read_identity
from piflow_dist.tracking.tracker import log_evaluation

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], Paths | None, list[str]]:
    """(numbers, report, what sources lack); the report is None where only statistics were made.

    Raises EvaluationError and ConfigError, and WorkerFailed where a process failed.
    """
    requests = check(config)
    out = config.out_dir
    out.mkdir(parents=True, exist_ok=True)
    with only_user(out / ".lock", f"out={out}"):
        lacking = list(filter(None, map(sample_source, requests)))
        config.samples = [*config.samples, *(request.out for request in requests)]
        settings = prepare(config)
        run_workers("piflow_dist.evaluation.compare", [str(settings)], config.launch, out / "logs")
        return *finish(config), lacking


def check(config: EvaluateConfig) -> list[SampleConfig]:
    """What to sample. Raises EvaluationError and ConfigError for what cannot be done, before the first image is made."""
    requests = [sample_settings(config, entry) for entry in config.sources]
    check_inputs(config)
    for request in requests:
        build_request(request)
    return requests


def describe_plan(config: EvaluateConfig) -> str:
    """What launch.dry_run=true says."""
    return f"Everything checked; {config.launch.processes} processes would measure. Folder: {config.out_dir}"


def sample_source(config: SampleConfig) -> str:
    """Make the folder of a source. Returns which images could not be made, in words; the others are compared.

    Raises WorkerFailed where there are no others, or sampling did not come to its end.
    """
    try:
        sample(config)
    except WorkerFailed as failure:
        out = Path(config.out)
        # Sampling removes both before it begins.
        if not ((out / META).is_file() and (out / FAILURES).is_file() and read_json(out / META)["images"]):
            raise
        log.warning("%s", failure)
        return str(failure)
    return ""


def check_inputs(config: EvaluateConfig) -> None:
    """Before any work: raises EvaluationError where a folder of samples is none, where two have one name, by which results are
    kept, and where reference= is neither a folder of samples nor the name of one."""
    made = [Path(sample_settings(config, entry).out) for entry in config.sources]
    folders = [open_samples(path).path for path in config.samples]
    named: dict[str, list[Path]] = {}
    for path in (*folders, *made):
        named.setdefault(path.resolve().name, []).append(path)
    for name, same in named.items():
        if len(same) > 1:
            raise EvaluationError(
                f"{same[0]} and {same[1]} are both named {name}, which results are kept by. Rename a folder, or give a source a "
                'name: "sources=[{source:RUN,name:NAME}]".'
            )
    if config.run not in (None, "none") and not (Path(config.run) / "config.yaml").is_file():
        raise EvaluationError(f"run={config.run} is no run folder: it has no config.yaml. Use run=none for no record.")
    if config.reference is None or config.reference in named:
        return
    reference = Path(config.reference)
    if reference.resolve() in [path.resolve() for path in made]:
        return
    if not reference.is_dir():
        raise EvaluationError(
            f"reference={reference} is neither a folder nor the name of one that is compared ({', '.join(named)})."
        )
    open_samples(reference)


def prepare(config: EvaluateConfig) -> Path:
    """The settings that processes read; an older result is gone, so that what is there afterwards is theirs."""
    config.out_dir.mkdir(parents=True, exist_ok=True)
    (config.out_dir / RESULT).unlink(missing_ok=True)
    path = config.out_dir / "settings.yaml"
    save_config(config, path)
    return path


def finish(config: EvaluateConfig) -> tuple[dict[str, Any], Paths | None]:
    """Report and record of what the processes found."""
    found = config.out_dir / RESULT
    if not found.is_file():
        raise EvaluationError(f"{found} is missing: the processes did not finish. Run the same command again.")
    result = json.loads(found.read_text())
    if not result["rows"]:
        return result, None
    paths = write_comparison(result, config.out_dir, config.name)
    run_dir = None if config.run == "none" else Path(config.run) if config.run is not None else run_of(result)
    if run_dir is not None:
        log_evaluation(run_dir, config.name, tracked_values(result), [paths.html, paths.markdown, *paths.pictures])
    return result, paths


def run_of(result: dict[str, Any]) -> Path | None:
    """The training run that the first student was sampled from, where it is tracked."""
    for row in result["rows"]:
        source = open_samples(row["folder"]).meta.get("source") if row["kind"] == "student" else None
        for folder in [Path(source), *Path(source).parents][:3] if source else []:
            if read_identity(folder):
                return folder
    return None
