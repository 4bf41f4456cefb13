"""Settings of tools/evaluate.py, and what is refused or missing before anything is measured."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_tool
from evaluation_samples import write_samples

from piflow_dist.config import ConfigError, read_config
from piflow_dist.evaluation import instruments, run
from piflow_dist.evaluation.compare import RESULT, compare
from piflow_dist.evaluation.comparison import write_comparison
from piflow_dist.evaluation.run import check_inputs
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.settings import EvaluateConfig, load_evaluation, sample_settings
from piflow_dist.evaluation.shares import Share
from piflow_dist.launch import batch
from piflow_dist.launch.exits import REFUSED
from piflow_dist.launch.local import WorkerFailed
from piflow_dist.sampling.gather import FAILURES
from piflow_dist.sampling.settings import SampleConfig


def test_a_source_takes_nested_settings() -> None:
    config = load_evaluation(["sources=[{source:RUN,parallel:{tp:2}}]", "launch.processes=2"])
    assert sample_settings(config, config.sources[0]).parallel.tp == 2


@pytest.mark.parametrize("entry", ["{source:RUN,parallel:{tpp:2}}", "{source:RUN,nfe:many}"])
def test_a_source_of_wrong_settings_is_refused(entry: str) -> None:
    config = load_evaluation([f"sources=[{entry}]"])
    with pytest.raises(ConfigError, match="sources"):
        sample_settings(config, config.sources[0])


@pytest.mark.parametrize(
    "arguments", [["sources=[source:RUN]", "sources=[nfe:2]"], ["sources=[{source:RUN},nfe:2]"], ["sources=RUN"]]
)
def test_braces_that_a_shell_expanded_are_told(arguments: list[str]) -> None:
    said = f"{' '.join(arguments)}: a source is {{source:RUN}} and .* which a shell expands. Quote it: "
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        load_evaluation(arguments)


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


def test_real_images_that_one_rank_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Share):
        """Beside a rank that sees no real images."""

        def together(self, mine: dict) -> dict:
            return mine | {"reason": "real=images does not exist."}

    monkeypatch.setattr(instruments, "real_statistics", lambda *_: pytest.fail("this rank went on alone"))
    tools = instruments.open_tools(EvaluateConfig(samples=["x"], real=str(tmp_path)), Blind(), None)
    assert tools.real is None and tools.notes["real"] == "real=images does not exist."
    tools = instruments.open_tools(EvaluateConfig(samples=["x"], real=str(tmp_path / "nowhere")), Share(), None)
    assert tools.notes["real"] == f"real={tmp_path / 'nowhere'} does not exist."


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


def test_what_a_source_lacks_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The first source has an image of two, the second both; one without any, or that did not finish, ends all."""
    out, images = tmp_path / "out", torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    lacking = {"first": 1}

    def sample(config: SampleConfig) -> Path:
        folder = Path(config.out)
        shutil.rmtree(folder, ignore_errors=True)
        missing = lacking.get(folder.name, 0)
        write_samples(folder, images[missing:], ["a", "b"][missing:])
        if missing:
            (folder / FAILURES).write_text("")
            raise WorkerFailed(f"{missing} of 2 images could not be made")
        return folder

    def measure(module: str, arguments: list[str], *_: object) -> None:
        (path,) = map(Path, arguments)
        path.with_name(RESULT).write_text(json.dumps(compare(read_config(path, EvaluateConfig), Share())))

    monkeypatch.setattr(run, "build_request", lambda config: None)
    monkeypatch.setattr(run, "sample", sample)
    monkeypatch.setattr(run, "run_workers", measure)
    tool = load_tool("evaluate")
    arguments = ["sources=[{source:RUN,name:first},{source:RUN,name:second}]", f"out={out}", "run=none", "resamples=0"]
    with pytest.raises(SystemExit, match="1"):
        tool.main(arguments)
    said = capsys.readouterr()
    assert "error: 1 of 2 images could not be made" in said.err and "Report: " in said.out
    assert [row["count"] for row in json.loads((out / "evaluation.json").read_text())["rows"]] == [1, 2]
    lacking["first"] = 2
    with pytest.raises(WorkerFailed, match="2 of 2 images"):
        tool.main(arguments)
    monkeypatch.setattr(run, "sample", ended)
    shutil.rmtree(out)
    with pytest.raises(WorkerFailed, match="Process 1 was ended"):
        tool.main(arguments)


def ended(config: SampleConfig) -> Path:
    raise WorkerFailed("Process 1 was ended")


def test_a_dry_run_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "sample", lambda *_: pytest.fail("it was sampled"))
    monkeypatch.setattr(run, "run_workers", lambda *_: pytest.fail("it was measured"))
    samples = write_samples(tmp_path / "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["a"])
    arguments = [f"samples={samples}", f"out={tmp_path / 'out'}", "launch.dry_run=true"]
    load_tool("evaluate").main(arguments)
    assert capsys.readouterr().out.startswith("Everything checked; 1 processes would measure.")
    with pytest.raises(SystemExit, match="2"):
        load_tool("evaluate").main([*arguments, f"run={tmp_path}"])
    assert "is no run folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for more in ([], ["launch.dry_run=false"]):  # a source that cannot be sampled is found as early
        with pytest.raises(ConfigError, match="nowhere"):
            load_tool("evaluate").main([*arguments, f"sources=[{{source:{tmp_path / 'nowhere'}}}]", *more])


def test_a_report_needs_no_folder_of_samples_that_may_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = write_samples(tmp_path / "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["a"])
    (samples / "metrics.json").mkdir()  # cannot be replaced, by root either
    result = compare(EvaluateConfig(samples=[str(samples)], resamples=0), Share())
    paths = write_comparison(result, tmp_path / "out", "evaluation")
    assert paths.html.is_file() and paths.markdown.is_file() and paths.numbers.is_file()
    assert "metrics.json cannot be written" in caplog.text


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
