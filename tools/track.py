"""Trainings and their MLflow runs, for people: python tools/track.py COMMAND ...

  compare RUN RUN ... [metric=loss] [out=comparison.png]    settings that differ, last and best values, a plot of the curves
  best metric=NAME [RUN ...] [mode=min|max] [count=10]       trainings by their best value: those named, or all of a store
  open [RUN]                                                 start MLflow's page on this machine, at the store of RUN
  sync RUN ...                                               send what MLflow has not got yet: once, in order
  register SOURCE name=NAME dataset=DIR [base=DIR]           log an exported student as an MLflow model, and register it

RUN is a run folder; for compare also the id of an MLflow run. uri=URI names another MLflow store than the run's own
(MLFLOW_TRACKING_URI where no run is named); experiment=NAME limits best to one experiment. SOURCE is an exported folder
(docs/export.md); run=RUN puts the model into that training's MLflow run.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from piflow_dist.cli import parse_options, run_tool
from piflow_dist.config import ConfigError, require, require_choice
from piflow_dist.launch.lock import only_user
from piflow_dist.tracking.comparison import SHOWN, all_in, differing, mode_of, plot, read_training
from piflow_dist.tracking.journal import TRACKING, outbox
from piflow_dist.tracking.register import RegisterOptions, register
from piflow_dist.tracking.secrets import mask
from piflow_dist.tracking.store import open_store

console = Console(soft_wrap=True, highlight=False)
COMMANDS = ("compare", "best", "open", "sync", "register")


@dataclass(kw_only=True)
class CompareOptions:
    metric: str = "loss"
    out: str = "comparison.png"
    uri: str | None = None


@dataclass(kw_only=True)
class BestOptions:
    metric: str = MISSING
    mode: str | None = None
    """min or max; default: max for the few that are known to be better so."""
    count: int = 10
    experiment: str | None = None
    uri: str | None = None


@dataclass(kw_only=True)
class OpenOptions:
    port: int = 5000
    uri: str | None = None


@dataclass(kw_only=True)
class NoOptions:
    pass


def track(arguments: list[str]) -> None:
    command, places, options = split(arguments)
    match command:
        case "compare":
            compare(places, parse_options(CompareOptions, options))
        case "best":
            best(places, parse_options(BestOptions, options))
        case "open":
            open_page(places, parse_options(OpenOptions, options))
        case "sync":
            parse_options(NoOptions, options)
            require(bool(places), "sync takes RUN ...; see --help.")
            failed = [place for place in places if not sync(Path(place))]
            require(not failed, f"Not everything was sent: {', '.join(failed)}. The same command tries again.")
        case "register":
            require(len(places) == 1, "register takes one SOURCE; see --help.")
            console.print(register(places[0], parse_options(RegisterOptions, options)), markup=False)
        case _:
            raise ConfigError(f"{command!r} is no command. Choose one of: {', '.join(COMMANDS)}; see --help.")


def split(arguments: list[str]) -> tuple[str, list[str], list[str]]:
    """Command, places, and options: key=value, or --key value (a place that holds a = is written ./so=)."""
    require(bool(arguments), f"Give a command: {', '.join(COMMANDS)}; see --help.")
    places, options, words = [], [], list(arguments[1:])
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            require("=" in word or bool(words), f"{word} needs a value.")
            options.append(word[2:] if "=" in word else f"{word[2:]}={words.pop(0)}")
        else:
            (options if "=" in word.partition("/")[0] else places).append(word)
    return arguments[0], places, options


def compare(places: list[str], options: CompareOptions) -> None:
    require(len(places) >= 2, "compare takes two or more RUNs; see --help.")
    uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI")
    trainings = [read_training(place, uri) for place in places]
    for training in trainings:
        require(
            bool(training.curves.get(options.metric)),
            f"metric={options.metric} is not logged by {training.name}. It has: {', '.join(sorted(training.curves))}.",
        )
    table = Table(box=box.SIMPLE, title="settings that differ", title_justify="left")
    for column in ("", *(training.name for training in trainings)):
        table.add_column(escape(column), overflow="fold")
    for key, values in differing(trainings).items():
        table.add_row(key, *map(escape, values))
    if table.row_count:
        console.print(table)
    else:
        console.print("No setting differs.")
    table = Table(box=box.SIMPLE, title="last value (best one, at its step)", title_justify="left")
    for column in ("", *(training.name for training in trainings)):
        table.add_column(escape(column), overflow="fold")
    for metric in dict.fromkeys((options.metric, *SHOWN)):
        if any(training.curves.get(metric) for training in trainings):
            table.add_row(metric, *(last_and_best(training, metric) for training in trainings))
    console.print(table)
    try:
        plot(trainings, options.metric, Path(options.out))
    except (OSError, ValueError) as error:
        raise ConfigError(f"out={options.out} cannot be written: {error}") from error
    console.print(f"Curves of {options.metric}: {options.out}", markup=False)


def last_and_best(training, metric: str) -> str:  # noqa: ANN001
    last, top = training.last(metric), training.best(metric, mode_of(metric))
    if last is None:
        return ""
    return f"{last:.5g}" + ("" if top is None else f" ({top[1]:.5g} at {top[0]})")


def best(places: list[str], options: BestOptions) -> None:
    mode = options.mode or mode_of(options.metric)
    require_choice("mode", mode, ("min", "max"))
    require(options.count > 0, f"count={options.count} must be greater than zero.")
    uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if places:
        trainings = [read_training(place, uri) for place in places]
    else:
        trainings = all_in(uri, options.experiment, options.metric)
    rated = [(training.best(options.metric, mode), training) for training in trainings]
    rated = [(point, training) for point, training in rated if point is not None]
    known = sorted({metric for training in trainings for metric in training.curves})
    require(
        bool(rated),
        f"metric={options.metric} is in none of these trainings."
        + (f" There are: {', '.join(known)}." if known else ""),
    )
    rated.sort(key=lambda pair: pair[0][1], reverse=mode == "max")
    table = Table(box=box.SIMPLE)
    for column in (options.metric, "step", "training"):
        table.add_column(column, overflow="fold")
    for (step, value), training in rated[: options.count]:
        table.add_row(f"{value:.6g}", str(step), escape(training.name))
    console.print(table)


def open_page(places: list[str], options: OpenOptions) -> None:
    require(len(places) <= 1, "open takes one RUN; see --help.")
    uri = options.uri or (open_store(Path(places[0])).uri if places else os.environ.get("MLFLOW_TRACKING_URI"))
    require(uri is not None, "Say which store: open RUN, uri=URI, or MLFLOW_TRACKING_URI.")
    if uri.startswith("http"):
        console.print(f"The runs are at {mask(uri)}", markup=False)
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--host=127.0.0.1"]
    command += [f"--port={options.port}", "--workers=1"]
    console.print(f"http://127.0.0.1:{options.port} shows {mask(shlex.quote(uri))}; Ctrl-C ends it.", markup=False)
    # Seven processes of 240 MB that run evaluations of language models on request.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument, which everybody on the machine can read
    code = subprocess.run(command, check=False, env=os.environ | quiet).returncode
    require(code == 0, f"MLflow's page ended with exit code {code}. Is port={options.port} in use? Choose another one.")


def sync(run_dir: Path) -> bool:
    store = open_store(run_dir)
    with only_user(run_dir / TRACKING / ".lock", f"run {run_dir}: its training is alive and sends by itself; it"):
        try:
            store.sync()
        except ConfigError:
            raise
        except Exception as error:  # whatever MLflow, requests or a database driver raise
            console.print(f"{run_dir}: MLflow ({mask(store.uri)}): {mask(str(error)).splitlines()[0]}", markup=False)
            return False
    console.print(
        f"{run_dir}: MLflow ({mask(store.uri)}) has {len(store.present)} steps, {len(outbox(run_dir))} things wait. "
        f"Run {store.run_id}.",
        markup=False,
    )
    return True


if __name__ == "__main__":
    run_tool(track, sys.argv[1:], __doc__)
