"""The trainer on buckets of images that it encodes itself, with workers: resumed exactly, on one process and on two."""

import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, run_tool

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from photos import settings, write_folder  # noqa: E402

from data_pipeline.prepare import prepare  # noqa: E402


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    prepare(
        settings(folder / "set", write_folder(folder / "photos", 24), latents="online", prompt_dim=64),
        show_progress=False,
    )
    return folder / "set"


def train(run: Path, online: Path, *changes: str) -> list[float]:
    done = run_tool(
        "launch",
        *TINY,
        "model.latent_channels=48",
        "objective=flow_matching",
        "data.caption_dropout=0.1",
        "data.augment=true",
        "data.num_workers=1",
        f"data.root={online}",
        f"run_dir={run}",
        "train.batch_size=4",
        "train.micro_batch_size=2",  # of one process or of two: the same noise
        "checkpoint.every=3",
        "tracking.enabled=false",
        *changes,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_on_line_training_resumes_exactly(online: Path, tmp_path: Path) -> None:
    """Nine steps over one and a half epochs of three buckets."""
    want = train(tmp_path / "whole", online, "train.steps=9")
    assert len(want) == 9
    train(tmp_path / "cut", online, "train.steps=5", "launch.processes=2")
    assert train(tmp_path / "cut", online, "train.steps=9", "launch.processes=2") == pytest.approx(want, rel=1e-4)
