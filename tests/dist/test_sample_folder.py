"""The folder of a sampling request while files beside it change: prompts that are edited, a training that saves on, two jobs."""

import json
import shutil
from pathlib import Path

import pytest

from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.config import ConfigError, load_config, read_config
from piflow_dist.launch import batch
from piflow_dist.launch.exits import FAILED, REFUSED
from piflow_dist.sampling.gather import check_unchanged, prepare_folder
from piflow_dist.sampling.run import lock_of, open_request, write_settings
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request


def request_for(source: Path, out: Path, *options: str) -> SampleRequest:
    return build_request(
        load_config([f"source={source}", f"out={out}", "launch.device=cpu", *options], SampleConfig, "sample")
    )


def test_processes_read_the_prompts_as_they_were(student_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a\u2028red square", "seeds": [3, 1]}, {"prompt": "a circle", "height": 16, "width": 32}]
    prompts.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    request = request_for(student_run, tmp_path / "out", f"prompts={prompts}")
    prepare_folder(request)
    settings = write_settings(request)
    prompts.write_text('{"prompt": "a triangle"}\n')
    again = build_request(read_config(settings, SampleConfig))
    check_unchanged(again)
    assert again.images == request.images


def test_what_changed_since_the_folder_was_prepared_is_refused(student_run: Path, tmp_path: Path) -> None:
    request = request_for(student_run, tmp_path / "out")
    prepare_folder(request)
    settings = write_settings(request)
    (tmp_path / "out" / "prompts.jsonl").write_text('{"prompt": "a triangle"}\n')
    with pytest.raises(ConfigError, match="images, images_sha256 changed"):
        check_unchanged(build_request(read_config(settings, SampleConfig)))


def test_what_is_begun_goes_on_with_its_checkpoint(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(student_run, run)
    options = [f"source={run}", f"out={out}", "launch.device=cpu"]

    def opened(*more: str) -> SampleRequest:
        return open_request(load_config([*options, *more], SampleConfig, "sample"))

    request = opened()
    prepare_folder(request)
    write_settings(request)
    newer = run / "checkpoints" / "step_00000099"
    shutil.copytree(request.checkpoint, newer)
    (newer / "manifest.json").write_text((newer / "manifest.json").read_text() + "\n")
    assert newest_complete(run / "checkpoints")[0] == newer

    assert opened().checkpoint == request.checkpoint
    assert opened("overwrite=true").checkpoint == opened("seed=7").checkpoint == newer
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = opened("overwrite=true")
    assert again.checkpoint == request.checkpoint and not again.config.overwrite
    shutil.rmtree(request.checkpoint)
    with pytest.raises(ConfigError, match="weights_sha256"):
        prepare_folder(opened("overwrite=true"))


def test_a_job_has_the_folder_until_it_has_gathered(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho RUNNING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    request = ("sample", f"source={student_run}", f"out={out}", "launch.device=cpu")
    assert batch.main(*request) == 0
    assert capsys.readouterr().out.strip() == str(out)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert batch.main(*request) == REFUSED
    assert f"out={out} is in use by job 12 (running)" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert batch.main("gather", str(out)) == FAILED  # no task has made anything
    assert lock_of(out).read_text() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert batch.main(*request) == 0
