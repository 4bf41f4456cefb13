"""An evaluation in MLflow: a child of the training whose student it measured, and never a reason to fail."""

from pathlib import Path

import mlflow
import pytest

from piflow_dist.config import Config, DataConfig, TrackingConfig, save_config
from piflow_dist.tracking.evaluations import log_evaluation
from piflow_dist.tracking.tracker import RUN_ID


def write_run(folder: Path, uri: str, run_id: str) -> Path:
    folder.mkdir(parents=True)
    tracking = TrackingConfig(uri=uri, experiment="evaluated")
    config = Config(run_dir=str(folder), objective="flow_matching", data=DataConfig(root="unused"), tracking=tracking)
    save_config(config, folder / "config.yaml")
    (folder / RUN_ID).write_text(run_id + "\n")
    return folder


def test_an_evaluation_is_a_child_of_its_training(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("evaluated", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = client.create_run(experiment).info.run_id
    for name in ("report.html", "grid.png"):
        (tmp_path / name).write_bytes(b"content")
    run_dir = write_run(tmp_path / "run", uri, parent)
    found = log_evaluation(
        run_dir, "four steps", {"student/fid": 2.5}, [tmp_path / "report.html", tmp_path / "grid.png"]
    )
    child = client.get_run(found)
    assert child.data.tags["mlflow.parentRunId"] == parent and child.info.experiment_id == experiment
    assert (child.info.run_name, child.info.status, child.data.metrics) == (
        "four steps",
        "FINISHED",
        {"student/fid": 2.5},
    )
    assert [file.path for file in client.list_artifacts(found)] == ["figures", "report.html"]
    assert client.get_run(parent).data.metrics == {}


def test_without_a_store_the_report_is_all_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert log_evaluation(tmp_path / "none", "evaluation", {"student/fid": 2.5}, []) is None
    assert "has no MLflow run" in caplog.text
    run_dir = write_run(tmp_path / "run", f"sqlite:///{tmp_path}/not/there/mlflow.db", "0" * 32)
    assert log_evaluation(run_dir, "evaluation", {"student/fid": 2.5}, []) is None
    assert "was not recorded in MLflow" in caplog.text
