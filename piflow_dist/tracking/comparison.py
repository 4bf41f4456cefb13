"""Trainings side by side: from run folders, or from MLflow where only its ids are known."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from piflow_dist.config import ConfigError, require
from piflow_dist.tracking.journal import METRICS, TIME, read_metrics
from piflow_dist.tracking.secrets import mask, masked
from piflow_dist.tracking.store import EVALUATION, SWEEP, connect, flatten

NOT_RATED = {"step", TIME}
SHOWN = ("loss", "loss_smooth", "velocity_error", "grad_norm", "seconds", "images_per_second", "probe/end_point")
HIGHER_IS_BETTER = ("images_per_second", "tokens_per_second", "tflops_per_gpu", "share_of_peak", "psnr", "diversity")


@dataclass(frozen=True)
class Training:
    name: str
    params: dict[str, str]
    curves: dict[str, list[tuple[int, float]]]
    """Of each metric, in the order of the steps."""

    def last(self, metric: str) -> float | None:
        return self.curves[metric][-1][1] if self.curves.get(metric) else None

    def best(self, metric: str, mode: str) -> tuple[int, float] | None:
        """(step, value) of the smallest or largest finite value; the first of equal ones."""
        finite = [point for point in self.curves.get(metric, []) if math.isfinite(point[1])]
        sign = 1 if mode == "min" else -1
        return min(finite, key=lambda point: sign * point[1]) if finite else None


def mode_of(metric: str) -> str:
    """min or max: what is better, as far as names tell."""
    return "max" if metric.rpartition("/")[2] in HIGHER_IS_BETTER or metric in HIGHER_IS_BETTER else "min"


def read_training(source: str, uri: str | None) -> Training:
    """source: a run folder, or the id of an MLflow run in `uri`. Raises ConfigError where it is neither."""
    path = Path(source)
    if (path / METRICS).is_file():
        return from_folder(path)
    require(
        not path.exists(), f"{source} is no run folder with a training in it: there is no {METRICS}. Give another one."
    )
    require(
        len(source) == 32 and source.isalnum(),
        f"{source} is neither a run folder nor the id of an MLflow run. Give one that exists.",
    )
    client = open_client(uri)
    return ask(uri, lambda: from_mlflow(client, client.get_run(source)))


def from_folder(path: Path) -> Training:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path / 'config.yaml'} cannot be read: {error}") from error
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path / METRICS):
        for key, value in row.items():
            if key not in NOT_RATED:
                curves.setdefault(key, []).append((row["step"], value))
    params = {key: str(value) for key, value in flatten(masked(values))}
    return Training(str(path), params, curves)


def from_mlflow(client: Any, run: Any) -> Training:
    curves = {}
    for key in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, key)
        curves[key] = sorted((metric.step, metric.value) for metric in history)
    return Training(run.info.run_name or run.info.run_id, dict(run.data.params), curves)


def all_in(uri: str | None, experiment: str | None, metric: str) -> list[Training]:
    """The trainings of a store that have a metric, with the curve of that one alone; evaluations are not among them."""
    client = open_client(uri)

    def found() -> list[Any]:
        names = [experiment] if experiment else [found.name for found in client.search_experiments()]
        known = [client.get_experiment_by_name(name) for name in names]
        require(None not in known, f"experiment={experiment} is not in {mask(uri or '')}.")
        return list(client.search_runs([one.experiment_id for one in known], max_results=5000))

    trainings = []
    for run in ask(uri, found):
        tags = run.data.tags
        if metric not in run.data.metrics or SWEEP in tags or EVALUATION in tags:
            continue
        history = ask(uri, lambda run_id=run.info.run_id: client.get_metric_history(run_id, metric))
        place = run.data.tags.get("run_dir", run.info.run_id)
        trainings.append(Training(place, dict(run.data.params), {metric: sorted((m.step, m.value) for m in history)}))
    return trainings


def open_client(uri: str | None) -> Any:
    require(
        uri is not None, "There is no run folder to look at. Say which MLflow store: uri=URI, or MLFLOW_TRACKING_URI."
    )
    return ask(uri, lambda: connect(uri))


def ask(uri: str | None, question: Callable[[], Any]) -> Any:
    """What a store answers. Raises ConfigError where it does not."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return question()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise ConfigError(
            f"MLflow (uri={mask(uri or '')}) does not answer: {mask(str(error)).splitlines()[0]}"
        ) from error


def differing(trainings: list[Training]) -> dict[str, list[str]]:
    """Settings that are not the same in all: key -> a value per training."""
    keys = sorted({key for training in trainings for key in training.params})
    rows = {key: [training.params.get(key, "") for training in trainings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def plot(trainings: list[Training], metric: str, path: Path) -> None:
    """A metric's curves, every point pale and a running mean of 5 % of them strong; logarithmic where all is positive."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    positive = True
    for index, training in enumerate(trainings):
        steps, values = zip(*training.curves[metric], strict=True)
        positive &= all(value > 0 for value in values)
        axes.plot(steps, values, color=f"C{index % 10}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=f"C{index % 10}", label=training.name)
    if positive:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential mean over some 5 % of the points, corrected at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means
