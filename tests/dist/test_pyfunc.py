"""An exported student as an MLflow model: registered by the tool, loaded by mlflow.pyfunc, asked for images."""

import io
import os
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
from conftest import PROMPTS, run_tool
from mlflow.pyfunc import PyFuncModel
from PIL import Image

NAME = "student-of-the-tests"


@pytest.fixture(scope="module")
def uri(student_run: Path) -> str:
    """The store of the training."""
    return f"sqlite:///{student_run.parent / 'mlflow.db'}"


@pytest.fixture(scope="module")
def model(student_run: Path, tiny_data: Path, uri: str, tmp_path_factory: pytest.TempPathFactory) -> PyFuncModel:
    exported = tmp_path_factory.mktemp("pyfunc") / "merged"
    done = run_tool("export", f"source={student_run}", f"out={exported}", "format=merged", "dtype=fp32")
    assert done.returncode == 0, done.stdout
    options = [f"name={NAME}", f"dataset={tiny_data}", f"run={student_run}", "device=cpu", "batch_size=2"]
    done = run_tool("track", "register", str(exported), *options)
    assert done.returncode == 0 and f"models:/{NAME}/1" in done.stdout, done.stdout
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # and the variable, for all processes that are started later
    try:
        return mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def pixels(frame: pandas.DataFrame) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(png))) for png in frame["png"]]


def test_images_depend_on_prompt_and_seed_alone(model: PyFuncModel) -> None:
    asked = pandas.DataFrame({"prompt": [PROMPTS[0], PROMPTS[1], PROMPTS[0]], "seed": [1, 1, 2]})
    made = model.predict(asked)
    assert list(made["prompt"]) == list(asked["prompt"]) and list(made["seed"]) == [1, 1, 2]
    images = pixels(made)
    assert len({image.tobytes() for image in images}) == 3
    assert all(image.std() > 0 for image in images)
    again = pixels(model.predict(asked[::-1]))[::-1]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(images, again, strict=True))


def test_the_model_is_the_trainings_and_nothing_in_it_is_a_pickle(
    model: PyFuncModel, student_run: Path, uri: str
) -> None:
    run_id = (student_run / "mlflow_run_id").read_text().strip()
    assert model.metadata.run_id == run_id
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    (version,) = client.search_model_versions(f"name='{NAME}'")
    assert version.run_id == run_id
    files = [path for path in (student_run.parent / "mlartifacts").rglob("*") if path.is_file()]
    assert any(path.name == "pyfunc_model.py" for path in files)
    assert [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")] == []


def test_what_is_no_export_is_refused(student_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = run_tool("track", "register", str(student_run), "name=x", f"dataset={tiny_data}", "uri=sqlite:///unused")
    assert done.returncode == 2 and "tools/export.py" in done.stdout and "Traceback" not in done.stdout
