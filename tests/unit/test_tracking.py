"""metrics.jsonl and MLflow (SQLite): every step once, also where a run was killed and continued."""

import json
import logging
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from piflow_dist.config import CheckpointConfig, Config, ConfigError, DataConfig, TrackingConfig, save_config
from piflow_dist.tracking.journal import outbox, write_identity
from piflow_dist.tracking.store import Store, artifact_location
from piflow_dist.tracking.tracker import (
    METRICS,
    RUN_ID,
    Tracker,
    describe_run,
    log_evaluation,
    read_metrics,
    tracking_uri,
    ui_command,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: creating its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def config(store: str, tmp_path: Path) -> Config:
    """A run of two rows a batch in an experiment of its own."""
    config = Config(
        run_dir=str(tmp_path / "runs" / "run"),
        objective="flow_matching",
        data=DataConfig(root="unused"),
        tracking=TrackingConfig(uri=store, experiment=tmp_path.name, log_every=2),
    )
    Path(config.run_dir).mkdir(parents=True)
    save_config(config, Path(config.run_dir) / "config.yaml")
    return config


@pytest.fixture
def offline(config: Config) -> Config:
    config.tracking.enabled = False
    return config


def record(tracker: Tracker, first: int, last: int, life: int = 0) -> None:
    """life tells the rows of one process from those that another one wrote for the same step."""
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / step, "life": float(life)})
    assert tracker.flush(60)


def file_rows(config: Config) -> list[tuple[int, float, float]]:
    lines = (Path(config.run_dir) / METRICS).read_text().splitlines()
    return [(row["step"], row["loss"], row["life"]) for row in map(json.loads, lines)]


def steps_and_lives(config: Config) -> list[tuple[int, float]]:
    return [(step, life) for step, _, life in file_rows(config)]


def all_runs(config: Config) -> list[Run]:
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def only_run(config: Config) -> Run:
    (run,) = all_runs(config)
    return run


def mlflow_rows(config: Config, run: Run, key: str = "loss") -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


def losses(last: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, last + 1)]


# metrics.jsonl


def test_every_step_is_on_disk_at_once(offline: Config) -> None:
    tracker = Tracker(offline, 1, 1)
    for step in range(1, 4):
        record(tracker, step, step)
        assert file_rows(offline) == [(s, 1 / s, 0.0) for s in range(1, step + 1)]  # not closed: a kill loses nothing
    tracker.close("FINISHED")
    assert not (Path(offline.run_dir) / RUN_ID).exists()


def test_a_resumed_run_cuts_the_rows_after_its_checkpoint(offline: Config) -> None:
    record(Tracker(offline, 1, 1), 1, 7)
    again = Tracker(offline, 5, 1)
    assert steps_and_lives(offline) == [(step, 0) for step in range(1, 5)]
    record(again, 5, 9, life=1)
    again.close("FINISHED")
    assert steps_and_lives(offline) == [(step, int(step >= 5)) for step in range(1, 10)]
    record(Tracker(offline, 1, 1), 1, 1, life=2)
    assert steps_and_lives(offline) == [(1, 2)]


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_half_written_last_line_is_dropped(offline: Config, kept: int) -> None:
    path = Path(offline.run_dir) / METRICS
    record(Tracker(offline, 1, 1), 1, 4)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:kept])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    record(Tracker(offline, 4, 1), 4, 5, life=1)
    assert steps_and_lives(offline) == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


def test_a_line_without_its_end_is_not_continued(offline: Config) -> None:
    """The last row was whole but for the line break: the next one must not be written behind it."""
    path = Path(offline.run_dir) / METRICS
    record(Tracker(offline, 1, 1), 1, 4)
    path.write_text(path.read_text().rstrip("\n"))
    record(Tracker(offline, 5, 1), 5, 5, life=1)
    assert [step for step, _ in steps_and_lives(offline)] in ([1, 2, 3, 5], [1, 2, 3, 4, 5])


def test_numbers_that_are_not_finite_survive(offline: Config) -> None:
    tracker = Tracker(offline, 1, 1)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    Tracker(offline, 2, 1)
    (row,) = read_metrics(Path(offline.run_dir) / METRICS)
    assert row["loss"] != row["loss"] and row["grad_norm"] == float("inf")


# MLflow


def test_one_life(config: Config) -> None:
    tracker = Tracker(config, 1, 3)
    record(tracker, 1, 5)
    running = only_run(config)
    assert running.info.status == "RUNNING"
    assert mlflow_rows(config, running) == losses(5)
    tracker.close("FINISHED")
    run = only_run(config)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert mlflow_rows(config, run) == losses(5)
    assert run.data.tags["world_size"] == "3"
    assert run.data.params["distill.guidance.scale"] == "4.0" and run.data.params["objective"] == "flow_matching"
    saved = Path(config.run_dir).parent / "mlartifacts" / run.info.run_id / "artifacts" / "config.yaml"
    assert saved.read_text() == (Path(config.run_dir) / "config.yaml").read_text()


@pytest.mark.parametrize("checkpoint", [0, 3, 4, 6], ids=lambda step: f"killed-at-7-checkpoint-of-{step}")
def test_a_continued_run_is_the_same_run_with_every_step_once(config: Config, checkpoint: int) -> None:
    """Also before the first checkpoint (0). Steps 1 to 6 had been sent, step 7 was waiting."""
    record(Tracker(config, 1, 2), 1, 7)
    killed = only_run(config)
    again = Tracker(config, checkpoint + 1, 4)
    assert only_run(config).info.status == "RUNNING"
    record(again, checkpoint + 1, 10)
    again.close("FINISHED")
    run = only_run(config)
    assert run.info.run_id == killed.info.run_id and run.info.status == "FINISHED"
    assert mlflow_rows(config, run) == losses(10)
    assert [row[0] for row in file_rows(config)] == list(range(1, 11))
    assert run.data.tags["world_size"] == "4"


@pytest.mark.parametrize("sent", [True, False], ids=["the store has the first life", "it has not"])
def test_what_a_step_that_is_done_again_has_more_arrives_once(config: Config, sent: bool) -> None:
    """The first life's save was complete by step 3, the second one's by step 4, which MLflow may have already, and 6."""
    config.tracking.enabled = sent
    tracker = Tracker(config, 1, 1)
    for step in range(1, 6):
        tracker.log(step, {"loss": 1 / step} | ({"checkpoint_stall": 3.0} if step == 3 else {}))
    assert tracker.flush(60)
    config.tracking.enabled = True
    again = Tracker(config, 3, 1)
    for step in range(3, 8):
        again.log(step, {"loss": 1 / step} | ({"checkpoint_stall": float(step)} if step in (4, 6) else {}))
    assert again.flush(60)
    again.close("FINISHED")
    assert Store(Path(config.run_dir)).sync()
    run = only_run(config)
    assert mlflow_rows(config, run) == losses(7)
    first = [(3, 3.0)] if sent else []
    assert mlflow_rows(config, run, "checkpoint_stall") == [*first, (4, 4.0), (6, 6.0)]


@pytest.mark.parametrize("told", [True, False], ids=["the store has it", "the store has it not"])
def test_an_end_between_sending_and_knowing_sends_nothing_twice(config: Config, told: bool) -> None:
    """After the first of two messages; the sender cannot know whether the second one arrived."""
    config.tracking.enabled = False
    record(Tracker(config, 1, 1), 1, 600)
    config.tracking.enabled = True
    write_identity(Path(config.run_dir), describe_run(config, 1, 1))
    store = Store(Path(config.run_dir), config)
    store._open()
    send, sent = store.client.log_batch, []

    def interrupted(*arguments: object, **options: object) -> None:
        if not sent or told:
            sent.append(send(*arguments, **options))
        if len(sent) == 2 or not told:
            raise TimeoutError

    store.client.log_batch = interrupted
    with pytest.raises(TimeoutError):
        store.sync()
    store.client.log_batch = send
    assert store.sync() and Store(Path(config.run_dir), config).sync()  # by the same process, and by another one
    for key in ("loss", "life"):
        assert [step for step, _ in mlflow_rows(config, only_run(config), key)] == list(range(1, 601))


def test_a_run_deleted_in_the_store_is_replaced(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    record(Tracker(config, 1, 1), 1, 4)
    deleted = only_run(config).info.run_id
    mlflow.MlflowClient(tracking_uri=config.tracking.uri).delete_run(deleted)
    with caplog.at_level(logging.WARNING, logger="piflow_dist"):
        record(Tracker(config, 3, 1), 3, 4)
    assert deleted in caplog.text
    assert mlflow_rows(config, only_run(config)) == losses(4)


def test_settings_that_a_kill_kept_from_the_store_follow(config: Config) -> None:
    client = mlflow.MlflowClient(tracking_uri=config.tracking.uri)
    artifacts = Path(config.run_dir).parent.as_uri()
    run = client.create_run(client.create_experiment(config.tracking.experiment, artifact_location=artifacts))
    (Path(config.run_dir) / RUN_ID).write_text(run.info.run_id)
    client.log_param(run.info.run_id, "objective", "flow_matching")
    Tracker(config, 1, 1)
    assert only_run(config).data.params["distill.guidance.scale"] == "4.0"


def test_a_failed_run_is_marked_and_has_its_last_steps(config: Config) -> None:
    tracker = Tracker(config, 1, 1)
    record(tracker, 1, 3)
    tracker.close("FAILED")
    run = only_run(config)
    assert run.info.status == "FAILED" and mlflow_rows(config, run) == losses(3)
    again = Tracker(config, 4, 1)
    assert only_run(config).info.status == "RUNNING"
    record(again, 4, 5)
    again.close("FINISHED")
    assert only_run(config).info.status == "FINISHED" and mlflow_rows(config, only_run(config)) == losses(5)


def test_an_outbox_that_takes_nothing_ends_no_training(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(config, 1, 1)
    assert tracker.flush(60)
    (Path(config.run_dir) / "tracking" / "outbox").rename(Path(config.run_dir) / "aside")
    (Path(config.run_dir) / "tracking" / "outbox").touch()  # as a full disk, a folder cannot be written to
    tracker.log_late(1, {"checkpoint_stall": 1.0})
    tracker.log_artifact(Path(config.run_dir) / "config.yaml")
    tracker.log_evaluation("FID", {"fid": 1.0})
    assert caplog.text.count("this is lost") == 3
    record(tracker, 1, 2)
    assert mlflow_rows(config, only_run(config)) == losses(2)


def test_more_numbers_than_one_message_may_hold(config: Config) -> None:
    config.tracking.log_every = 600
    tracker = Tracker(config, 1, 1)
    record(tracker, 1, 600)
    for key in ("loss", "life"):
        assert [step for step, _ in mlflow_rows(config, only_run(config), key)] == list(range(1, 601))


def test_starting_afresh_is_a_new_run(config: Config) -> None:
    record(Tracker(config, 1, 1), 1, 4)
    config.checkpoint = CheckpointConfig(resume=False)
    fresh = Tracker(config, 1, 1)
    record(fresh, 1, 2, life=1)
    fresh.close("FINISHED")
    old, new = all_runs(config)
    assert mlflow_rows(config, old) == losses(4) and mlflow_rows(config, new) == losses(2)
    assert (Path(config.run_dir) / RUN_ID).read_text().strip() == new.info.run_id
    assert steps_and_lives(config) == [(1, 1), (2, 1)]


def test_a_store_without_the_saved_run_gets_a_new_one(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    missing = "0123456789abcdef0123456789abcdef"
    config.tracking.enabled = False
    record(Tracker(config, 1, 1), 1, 2)
    config.tracking.enabled = True
    (Path(config.run_dir) / RUN_ID).write_text(missing + "\n")
    with caplog.at_level(logging.WARNING, logger="piflow_dist"):
        tracker = Tracker(config, 3, 1)
    (message,) = [entry.getMessage() for entry in caplog.records if entry.name.startswith("piflow_dist")]
    assert missing in message and config.tracking.uri in message
    record(tracker, 3, 4)
    assert mlflow_rows(config, only_run(config)) == losses(4)
    assert (Path(config.run_dir) / RUN_ID).read_text().strip() == only_run(config).info.run_id
    caplog.clear()
    record(Tracker(config, 5, 1), 5, 6)  # from now on that one
    assert mlflow_rows(config, only_run(config)) == losses(6) and not caplog.records


# Where the runs are


def test_tools_go_where_the_training_went(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a shell without the training's variables, or with others; and they begin no run of their own there."""
    uri, run_dir, config.tracking.uri = config.tracking.uri, Path(config.run_dir), None
    save_config(config, run_dir / "config.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker(config, 1, 1)
    record(tracker, 1, 2)
    tracker.close("FINISHED")
    for elsewhere in ("", "http://elsewhere"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
        assert Store(run_dir).uri == uri and log_evaluation(run_dir, f"with {elsewhere}", {"fid": 1.0})
    run_id = (run_dir / RUN_ID).read_text()
    mlflow.MlflowClient(tracking_uri=uri).delete_run(run_id.strip())
    assert not log_evaluation(run_dir, "later", {"fid": 1.0}) and len(outbox(run_dir)) == 1
    with pytest.raises(ConfigError, match="Only a training"):
        Store(run_dir).sync()
    assert (run_dir / RUN_ID).read_text() == run_id


def test_the_run_folder_names_the_store_without_its_password(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, run_dir, config.tracking.uri = "postgresql://ada:hunter2hunter2@host/db", Path(config.run_dir), None
    save_config(config, run_dir / "config.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_identity(run_dir, describe_run(config, 1, 1))
    assert "hunter2" not in (run_dir / "tracking" / "run.json").read_text() and Store(run_dir).uri == uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Store(run_dir).uri == "postgresql://host/db"


def test_the_store_is_the_option_or_the_variable_or_beside_the_run(
    offline: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline.tracking.uri, offline.run_dir = "http://option", "outputs/demo/teacher"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable")
    assert tracking_uri(offline) == "http://option"
    offline.tracking.uri = None
    assert tracking_uri(offline) == "http://variable"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(offline) == f"sqlite:///{tmp_path}/outputs/demo/mlflow.db"  # absolute: four slashes


def test_artifacts_do_not_land_where_the_command_was_typed(tmp_path: Path) -> None:
    for uri in ("sqlite:////a/mlflow.db", "postgresql://host/db", "mysql+pymysql://host/db"):
        assert artifact_location(uri, tmp_path) == f"file://{tmp_path}/mlartifacts"
    assert artifact_location("https://host", tmp_path) is None


def test_a_folder_is_no_store(offline: Config) -> None:
    offline.tracking.uri = "file:///runs/mlruns"
    with pytest.raises(ConfigError, match="sqlite:////runs/mlruns/mlflow.db"):
        tracking_uri(offline)


def test_the_command_that_shows_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works as printed, with the environment activated or not."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "mlflow"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert ui_command("sqlite:////a/mlflow.db") == "bin/mlflow ui --backend-store-uri sqlite:////a/mlflow.db"
    monkeypatch.chdir(tmp_path / "bin")
    assert ui_command("sqlite:////a/mlflow.db").startswith("./mlflow ui")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ui_command("sqlite:////a/mlflow.db").startswith(f"{tmp_path}/bin/mlflow ui")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ui_command("sqlite:////a/mlflow.db").startswith("mlflow ui")
    assert ui_command("https://host") == "open https://host"
