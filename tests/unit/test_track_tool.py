"""tools/track.py on run folders and an SQLite store; sweeps and evaluations as MLflow sees them; lineage; the console's lines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from conftest import load_tool

from piflow_dist.config import Config, DataConfig, OptimConfig, TrackingConfig, save_config
from piflow_dist.launch.console import StepLine, StepProgress
from piflow_dist.tracking.comparison import read_training
from piflow_dist.tracking.journal import now, outbox, post, post_artifact
from piflow_dist.tracking.lineage import write_lineage
from piflow_dist.tracking.store import PARENT, SWEEP
from piflow_dist.tracking.tracker import Tracker, log_evaluation


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings of a sweep in one store, with an evaluation of one of them."""
    folder = tmp_path_factory.mktemp("track") / "sweep"
    for lr in (0.1, 0.2):
        run_dir = folder / f"optim.lr={lr}"
        config = Config(
            run_dir=str(run_dir),
            objective="flow_matching",
            data=DataConfig(root="unused"),
            optim=OptimConfig(lr=lr),
            tracking=TrackingConfig(uri=f"sqlite:///{folder.parent}/mlflow.db", sweep=str(folder)),
        )
        run_dir.mkdir(parents=True)
        save_config(config, run_dir / "config.yaml")
        tracker = Tracker(config, 1, 1)
        for step in range(1, 13):
            tracker.log(step, {"loss": lr + 1 / step, "images_per_second": step * lr})
        assert tracker.flush(120)
        tracker.close("FINISHED")
    (folder / "report.md").write_text("fine")
    assert log_evaluation(folder / "optim.lr=0.1", "evaluation", {"fid": 2.0}, [folder / "report.md"], step=12)
    return folder


@pytest.fixture
def runs(sweep: Path) -> list[str]:
    return [str(sweep / f"optim.lr={lr}") for lr in (0.1, 0.2)]


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    tool = load_tool("track")

    def said(*arguments: str) -> str:
        tool.console.width = 200
        tool.track(list(arguments))
        return capsys.readouterr().out

    return said


@pytest.fixture
def refused(refused_by: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return refused_by("track")


def test_trainings_side_by_side(said: Callable[..., str], runs: list[str], tmp_path: Path) -> None:
    out = said("compare", *runs, f"out={tmp_path / 'c.png'}")
    assert "optim.lr" in out and "0.1" in out and "0.2" in out and "objective" not in out
    assert "0.18333 (0.18333 at 12)" in out and "0.28333" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_an_mlflow_id_stands_for_a_folder(runs: list[str], sweep: Path) -> None:
    run_id = (Path(runs[0]) / "mlflow_run_id").read_text().strip()
    folder, store = read_training(runs[0], None), read_training(run_id, f"sqlite:///{sweep.parent}/mlflow.db")
    assert store.curves == folder.curves and store.params == folder.params


@pytest.mark.parametrize("notation", [["metric=loss"], ["--metric", "loss"], ["--metric=loss"]])
def test_the_best_training_of_a_store_comes_first(said: Callable[..., str], sweep: Path, notation: list[str]) -> None:
    out = said("best", *notation, f"uri=sqlite:///{sweep.parent}/mlflow.db")
    assert 0 < out.index("optim.lr=0.1") < out.index("optim.lr=0.2")


def test_more_images_per_second_are_better(said: Callable[..., str], runs: list[str]) -> None:
    out = said("best", "metric=images_per_second", *runs)
    assert out.index("optim.lr=0.2") < out.index("optim.lr=0.1")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["best"], "metric=... is needed"),
        (["best", "metric=nothing", "{run}"], "There are: images_per_second, loss"),
        (["best", "metric=loss", "mode=low", "{run}"], "mode=low"),
        (["best", "metric=loss", "uri=http://ada:hunter2hunter2@127.0.0.1:9"], "does not answer"),
        (["compare", "{run}"], "two or more"),
        (["compare", "{run}", "nowhere"], "nowhere is neither"),
        (["compare", "{run}", "{run}", "metric=x"], "It has: "),
        (["sync", "/proc"], "no run folder"),
        (["open", "nowhere"], "no run folder"),
        (
            ["register", "x", "name=y", "dataset=s3://ada:hunter2hunter2@bucket/set"],
            "dataset=s3://***@bucket/set holds",
        ),
        (["fly"], "Choose one of: compare"),
        (["best", "--metric"], "needs a value"),
    ],
)
def test_what_cannot_be_done_is_said(
    refused: Callable[..., str], runs: list[str], arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    message = refused(*(argument.format(run=runs[0]) for argument in arguments))
    assert reason in message and "hunter2hunter2" not in message


def test_sync_sends_what_waits_once(said: Callable[..., str], runs: list[str], sweep: Path) -> None:
    run_dir = Path(runs[1])
    post_artifact(run_dir, sweep / "report.md", "late")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "loss": 0.5, "time": now()}) + "\n")
    assert "has 13 steps, 0 things wait" in said("sync", str(run_dir))
    assert "has 13 steps" in said("sync", str(run_dir)) and not outbox(run_dir)
    client = mlflow.MlflowClient(f"sqlite:///{sweep.parent}/mlflow.db")
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == list(range(1, 14))
    assert [file.path for file in client.list_artifacts(run_id, "late")] == ["late/report.md"]


def test_a_password_is_no_argument_of_the_page(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(command: list[str], **options: dict[str, str]) -> SimpleNamespace:
        started.append((command, options["env"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run)
    uri = "postgresql://ada:hunter2hunter2@host/db"
    assert "hunter2" not in said("open", f"uri={uri}")
    ((command, variables),) = started
    assert "hunter2" not in " ".join(command) and variables["MLFLOW_BACKEND_STORE_URI"] == uri


def test_a_sweep_is_the_parent_and_an_evaluation_a_child(runs: list[str], sweep: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{sweep.parent}/mlflow.db")
    first, second = (client.get_run((Path(run) / "mlflow_run_id").read_text().strip()) for run in runs)
    parent = client.get_run(first.data.tags[PARENT])
    assert second.data.tags[PARENT] == parent.info.run_id
    assert parent.data.tags[SWEEP] == str(sweep) and parent.info.run_name == "sweep"
    (child,) = client.search_runs([first.info.experiment_id], f"tags.`{PARENT}` = '{first.info.run_id}'")
    assert child.data.metrics == {"fid": 2.0} and child.info.status == "FINISHED"
    (metric,) = client.get_metric_history(child.info.run_id, "fid")
    assert metric.step == 12
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["report.md"]


def test_an_entry_that_mlflow_refuses_holds_up_no_other(
    said: Callable[..., str], runs: list[str], sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = Path(runs[1])
    post(run_dir, "metrics", step="last", values={"late": 1.0})  # no number
    values = {"optim.lr=0.1,policy=dx/fid": 1.5, "/a//b": 2.5}
    assert log_evaluation(run_dir, "names", values, [sweep / "report.md"])
    (refused,) = (run_dir / "tracking" / "refused").iterdir()
    assert json.loads(refused.read_text())["step"] == "last" and str(refused) in caplog.text
    client = mlflow.MlflowClient(f"sqlite:///{sweep.parent}/mlflow.db")
    run = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    assert run.info.status == "FINISHED" and not outbox(run_dir)
    (child,) = client.search_runs([run.info.experiment_id], "attributes.run_name = 'names'")
    assert child.data.metrics == {"optim.lr_0.1_policy_dx/fid": 1.5, "a/b": 2.5}
    assert "0 things wait" in said("sync", str(run_dir))


def write_checkpoint(run_dir: Path, step: int, parent: str | None) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "dp_size": 1, "tp": 1, "parent": parent, "metrics": {"loss": 1 / step}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").write_text("{}")
    return folder


def test_lineage_remembers_checkpoints_that_are_gone(tmp_path: Path) -> None:
    def lineage() -> list[tuple[int, bool, str | None]]:
        write_lineage(tmp_path)
        entries = json.loads((tmp_path / "tracking" / "lineage.json").read_text())
        return [(entry["step"], entry["on_disk"], entry["parent"]) for entry in entries]

    (tmp_path / "tracking").mkdir()
    write_lineage(tmp_path)
    assert not outbox(tmp_path)  # nothing to tell
    first = write_checkpoint(tmp_path, 2, None)
    assert lineage() == [(2, True, None)] and len(outbox(tmp_path)) == 1
    for path in outbox(tmp_path):
        path.unlink()
    assert lineage() == [(2, True, None)] and not outbox(tmp_path)
    write_checkpoint(tmp_path, 4, str(first))
    (first / "state.json").unlink(), (first / "manifest.json").unlink(), first.rmdir()
    assert lineage() == [(2, False, None), (4, True, str(first))]


def test_plain_lines_go_to_the_terminals_place_and_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = StepLine()
    rows = [{"loss": 1 / step, "grad_norm": 2.0, "seconds": 0.5} for step in range(1, 5)]
    rows[1] |= {"memory/host_gib": 1.25, "data_wait": 0.015}
    with StepProgress("run", 4, every=2, lines=tmp_path / "progress.log") as progress:
        for step, row in enumerate(rows, 1):
            progress.update(step, line(row, 10))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[1].startswith("run 4/4")
    for words in ("loss 0.2500", "grad 2", "0.500 s/step", "1.2 GiB", "data 1.5%", "saves at 10", "eta 0:00:00"):
        assert words in printed[1]
    logged = (tmp_path / "progress.log").read_text().splitlines()
    assert [text.split(" ", 2)[2] for text in logged] == printed


def test_a_terminal_gets_one_line_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from piflow_dist.launch import console

    with open(tmp_path / "terminal", "w") as terminal:
        monkeypatch.setattr(console, "console", Console(file=terminal, force_terminal=True, width=160))
        with StepProgress("run", 2, every=1, lines=tmp_path / "progress.log") as progress:
            progress.update(2, "loss 0.5")
    assert "loss 0.5" in (tmp_path / "terminal").read_text() and sys.stdout is not terminal
    assert "run 2/2" in (tmp_path / "progress.log").read_text()
