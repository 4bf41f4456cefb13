"""The planner's process beside a training: nothing of an earlier start is left, and its failure is told."""

import logging
import time
from pathlib import Path

import pytest

from piflow_dist.config import Config, DataConfig, TrackingConfig
from piflow_dist.tracking.planned import start_planning


@pytest.mark.parametrize("peak", [None, 1.0], ids=["not wanted", "wanted"])
def test_an_earlier_starts_plan_is_removed(
    peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(
        run_dir=str(tmp_path),
        objective="flow_matching",
        data=DataConfig(root="unused"),
        tracking=TrackingConfig(peak_tflops=peak),
    )
    for name in ("logs", "tracking"):
        (tmp_path / name).mkdir()
    for name in ("plan.json", "plan.txt"):
        (tmp_path / "tracking" / name).write_text("{}")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with caplog.at_level(logging.WARNING, logger="piflow_dist"):
        process = start_planning(config)
        assert not any((tmp_path / "tracking").iterdir())
        if peak is None:
            assert process is None
            return
        deadline = time.monotonic() + 60
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "exit code 1" in caplog.text and str(tmp_path / "logs" / "plan.log") in caplog.text
