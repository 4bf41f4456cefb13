"""Settings of tools/evaluate.py, and what is refused or missing before anything is measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from evaluation_samples import write_samples

from piflow_dist.config import ConfigError, read_config
from piflow_dist.evaluation import instruments, run
from piflow_dist.evaluation.compare import RESULT, compare
from piflow_dist.evaluation.run import check_inputs
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.settings import EvaluateConfig, load_evaluation, sample_settings
from piflow_dist.evaluation.shares import Share
from piflow_dist.launch import batch
from piflow_dist.launch.exits import REFUSED


def test_a_source_takes_nested_settings() -> None:
    config = load_evaluation(["sources=[{source:RUN,parallel:{tp:2}}]", "launch.processes=2"])
    assert sample_settings(config, config.sources[0]).parallel.tp == 2


@pytest.mark.parametrize("entry", ["{source:RUN,parallel:{tpp:2}}", "{source:RUN,nfe:many}"])
def test_a_source_of_wrong_settings_is_refused(entry: str) -> None:
    config = load_evaluation([f"sources=[{entry}]"])
    with pytest.raises(ConfigError, match="sources"):
        sample_settings(config, config.sources[0])


def test_statistics_have_a_working_folder_of_their_own(tmp_path: Path) -> None:
    config = EvaluateConfig(stats=str(tmp_path / "coco.safetensors"), real="images", inception="weights")
    assert config.out_dir == tmp_path / "coco.safetensors.work"


def test_a_mistyped_reference_is_found_before_sampling() -> None:
    sources = [{"source": "runs/a", "name": "a"}]
    check_inputs(EvaluateConfig(sources=sources, reference="a"))
    with pytest.raises(
        EvaluationError, match="reference=nobody is neither a folder nor the name of one that is compared .a.[.]"
    ):
        check_inputs(EvaluateConfig(sources=sources, reference="nobody"))


def test_no_small_network_in_place_of_a_missing_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "small_network_of", lambda *_: pytest.fail("a small network was trained"))
    config = EvaluateConfig(samples=["x"], inception=str(tmp_path / "nowhere"), dataset=str(tmp_path))
    tools = instruments.open_tools(config, Share(0, 1, torch.device("cpu")), None)
    assert tools.network is None and "nowhere" in tools.notes["features"]


def test_folders_of_one_name_are_refused_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sample", lambda *_: pytest.fail("it was sampled"))
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    first, second = (str(write_samples(tmp_path / parent / "samples", image, ["a"])) for parent in ("a", "b"))
    check_inputs(EvaluateConfig(samples=[first]))
    two = {"samples": [first, second], "sources": []}
    one_of_each = {"samples": [first], "sources": [{"source": "runs/a", "name": "samples"}]}
    two_made = {"samples": [], "sources": [{"source": "a/run", "nfe": 2}, {"source": "b/run", "nfe": 2}]}
    for inputs, name in ((two, "samples"), (one_of_each, "samples"), (two_made, "run_nfe2")):
        with pytest.raises(EvaluationError, match=f"are both named {name}, which results are kept by"):
            run.evaluate(EvaluateConfig(out=str(tmp_path / "out"), **inputs))


def test_a_folder_of_folders_says_what_is_in_it(tmp_path: Path) -> None:
    folders = [write_samples(tmp_path / name, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["a"]) for name in ("a", "b")]
    with pytest.raises(EvaluationError, match=re.escape(f"Name them: samples=[{folders[0]},{folders[1]}].")):
        check_inputs(EvaluateConfig(samples=[str(tmp_path)]))


def test_statistics_without_a_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="stats= are of a feature network's answers. Give inception=FILE"):
        EvaluateConfig(stats="x.safetensors", real="images")


@pytest.mark.parametrize("rewards", [["a:score", "b:score"], ["a:fid"]])
def test_rewards_of_one_name_are_refused(rewards: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"rewards: {rewards[0]} would be the second metric named"):
        EvaluateConfig(samples=["x"], rewards=rewards)


def test_a_job_has_its_folder_until_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    samples = write_samples(tmp_path / "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["a"])
    out = tmp_path / "out"
    overrides = [f"samples={samples}", f"out={out}", "launch.device=cpu"]
    monkeypatch.setattr("piflow_dist.launch.lock.settled_state", lambda job: "RUNNING")
    monkeypatch.setenv("SLURM_NTASKS", "1")

    def as_job(number: int, command: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        code = batch.main(command, *arguments)
        said = capsys.readouterr()
        return code, said.out.strip() + said.err.strip()

    refused = (
        REFUSED,
        f"error: out={out} is in use by job 12 (running). Wait for it, end it with scancel 12, or choose another folder.",
    )
    assert as_job(12, "evaluate", *overrides) == (0, str(out / "settings.yaml"))
    assert as_job(13, "evaluate", *overrides) == refused
    assert as_job(12, "evaluate", *overrides)[0] == 0  # as a requeued job does
    code, said = as_job(12, "report", str(out / "settings.yaml"))
    assert code == REFUSED and "result.json is missing: the processes did not finish" in said
    assert as_job(13, "evaluate", *overrides)[0] == 0
    result = compare(read_config(out / "settings.yaml", EvaluateConfig), Share())
    (out / RESULT).write_text(json.dumps(result))
    capsys.readouterr()
    assert as_job(13, "report", str(out / "settings.yaml")) == (0, f"Report: {out / 'evaluation.html'}")
    assert as_job(14, "evaluate", *overrides)[0] == 0


def test_a_job_is_told_what_cannot_be_evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    samples = write_samples(tmp_path / "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["a"])
    assert batch.main("evaluate", f"samples={samples}", "reference=nobody", f"out={tmp_path / 'out'}") == REFUSED
    assert not (tmp_path / "out").exists()
