"""The folder of a sampling request while files beside it change: prompts that are edited, a training that saves on, two jobs."""

import json
from pathlib import Path

import pytest

from piflow_dist.config import ConfigError, load_config, read_config
from piflow_dist.sampling.gather import check_unchanged, prepare_folder
from piflow_dist.sampling.run import write_settings
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
