"""MLflow on a real server that is away, killed, silent and back again: no metric is lost, none is there twice."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import STUDENT, run_tool
from mlflow.entities import Run
from mlflow_server import MlflowServer
from ports import kept_port

from piflow_dist.config import Config, DataConfig, TrackingConfig, save_config
from piflow_dist.launch.lives import Aim, Life
from piflow_dist.tracking.journal import outbox
from piflow_dist.tracking.tracker import METRICS, RUN_ID, Tracker, log_evaluation, read_metrics

LIMIT = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Not started."""
    patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with pytest.MonkeyPatch.context() as patch, kept_port() as port:
        for name, value in patience.items():
            patch.setenv(name, value)
        patch.setattr("piflow_dist.tracking.tracker.LONGEST_PAUSE", 2.0)
        server = MlflowServer(tmp_path_factory.mktemp("server"), port)
        yield server
        server.kill()


def until(reached: Callable[[], bool], do: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + LIMIT
    while not reached():
        assert time.monotonic() < deadline
        do()
        time.sleep(0.02)


def runs(server: MlflowServer, experiment: str) -> list[Run]:
    """Of the trainings of an experiment, without their children."""
    found = server.client.get_experiment_by_name(experiment)
    children = "mlflow.parentRunId"
    return [run for run in server.client.search_runs([found.experiment_id]) if children not in run.data.tags]


def curve(server: MlflowServer, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    """In the order in which MLflow took it."""
    return [(metric.step, metric.value) for metric in server.client.get_metric_history(run_id, key)]


def on_disk(run_dir: Path, key: str = "loss") -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in read_metrics(run_dir / METRICS)]


def test_a_training_killed_four_times_under_a_server_that_dies_is_one_run(
    server: MlflowServer, student_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The server is away at the start, is killed under the third life, comes back under the fourth and is killed again; the fifth
    one ends without it."""
    run_dir = tmp_path / "runs" / "student"
    run_dir.parent.mkdir()
    arguments = [
        *STUDENT,
        f"data.root={tiny_data}",
        f"distill.teacher={find_teacher(student_run)}",
        f"tracking.uri={server.uri}",
        "tracking.experiment=killed",
        "tracking.log_every=2",
        "checkpoint.every=5",
        "launch.start=fork",
    ]

    def live(steps: int = 100_000) -> Life:
        return Life([*arguments, f"train.steps={steps}"], run_dir, tmp_path / "log", fork=True, save_delay=0)

    life = live()
    assert life.kill(Aim("step", 4, 0, 0), LIMIT) == "rank 0", (tmp_path / "log").read_text()
    life.wait(LIMIT)
    assert not (run_dir / RUN_ID).exists()

    server.start()
    life = live()
    life.wait_for((run_dir / RUN_ID).exists, LIMIT)
    run_id = (run_dir / RUN_ID).read_text().strip()
    life.wait_for(lambda: len(curve(server, run_id)) > 0, LIMIT)
    assert life.kill(Aim("step", 0, 0, 0), LIMIT) == "rank 0", (tmp_path / "log").read_text()
    life.wait(LIMIT)

    life = live()
    life.wait_for(lambda: life.step() > life.first_step, LIMIT)
    server.kill()
    assert life.kill(Aim("step", 12, 0, 0), LIMIT) == "rank 0", (tmp_path / "log").read_text()
    life.wait(LIMIT)

    life = live()
    life.wait_for(lambda: life.step() > life.first_step, LIMIT)
    sent = on_disk(run_dir)[-1][0]
    server.start()
    life.wait_for(lambda: curve(server, run_id)[-1][0] > sent, LIMIT)
    server.kill()
    assert life.kill(Aim("step", 0, 0, 0), LIMIT) == "rank 0", (tmp_path / "log").read_text()
    life.wait(LIMIT)

    last = on_disk(run_dir)[-1][0] + 10
    life = live(last)
    assert life.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    assert "cannot be reached" in (run_dir / "logs" / "rank_0.log").read_text()
    assert [step for step, _ in on_disk(run_dir)] == list(range(1, last + 1))
    server.start()
    done = run_tool("track", "sync", str(run_dir))
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout

    (run,) = runs(server, "killed")
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    for key in ("loss", "grad_norm"):
        assert curve(server, run_id, key) == on_disk(run_dir, key)
    assert run.data.tags["starts"] == "5" and not outbox(run_dir)


def find_teacher(student_run: Path) -> str:
    from piflow_dist.config import read_config

    return read_config(student_run / "config.yaml").distill.teacher


def test_a_server_that_is_killed_or_silent_costs_no_metric(server: MlflowServer, tmp_path: Path) -> None:
    config = Config(
        run_dir=str(tmp_path / "run"),
        objective="flow_matching",
        data=DataConfig(root="unused"),
        tracking=TrackingConfig(uri=server.uri, experiment="silent", log_every=3, patience_seconds=120),
    )
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    save_config(config, run_dir / "config.yaml")
    if not server.answers():
        server.start()
    tracker = Tracker(config, 1, 1)
    count = 0

    def steps(number: int = 1) -> None:
        nonlocal count
        for _ in range(number):
            count += 1
            tracker.log(count, {"loss": 1 / count, "grad_norm": float(count)})

    until(lambda: (run_dir / RUN_ID).exists(), steps)
    run_id = (run_dir / RUN_ID).read_text().strip()
    server.hang()
    steps(200)
    assert not tracker.flush(60)  # the time limit of one request
    tracker.log_artifact(write(tmp_path / "grid.png"), "grids")
    assert not log_evaluation(run_dir, "FID", {"fid": 3.5}, [write(tmp_path / "report.html")], step=7)
    server.go_on()
    until(lambda: tracker.flush(10), steps)
    server.kill()
    steps(50)
    assert not tracker.flush(60)
    server.start()
    until(lambda: tracker.flush(10), steps)
    until(lambda: not outbox(run_dir), tracker.sender.wake.set)
    tracker.log_late(count, {"checkpoint_stall": 0.5})
    tracker.close("FINISHED")

    (run,) = runs(server, "silent")
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    assert curve(server, run_id) == on_disk(run_dir) == [(step, 1 / step) for step in range(1, count + 1)]
    assert curve(server, run_id, "checkpoint_stall") == [(count, 0.5)]
    assert [file.path for file in server.client.list_artifacts(run_id, "grids")] == ["grids/grid.png"]
    (child,) = server.client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert child.info.run_name == "FID" and child.data.metrics == {"fid": 3.5}
    assert [file.path for file in server.client.list_artifacts(child.info.run_id)] == ["report.html"]


def write(path: Path) -> Path:
    path.write_bytes(os.urandom(64))
    return path
