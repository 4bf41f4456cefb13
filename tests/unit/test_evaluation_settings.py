"""Settings of tools/evaluate.py, and what is refused or missing before anything is measured."""

from pathlib import Path

import pytest
import torch

from piflow_dist.config import ConfigError
from piflow_dist.evaluation import instruments
from piflow_dist.evaluation.compare import check_names
from piflow_dist.evaluation.folder import SampleList
from piflow_dist.evaluation.run import check_reference
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.evaluation.settings import EvaluateConfig, load_evaluation, sample_settings
from piflow_dist.evaluation.shares import Share


def test_a_source_takes_nested_settings() -> None:
    config = load_evaluation(["sources=[{source:RUN,parallel:{tp:2}}]", "launch.processes=2"])
    assert sample_settings(config, config.sources[0]).parallel.tp == 2


@pytest.mark.parametrize("entry", ["{source:RUN,parallel:{tpp:2}}", "{source:RUN,nfe:many}"])
def test_a_source_of_wrong_settings_is_refused(entry: str) -> None:
    config = load_evaluation([f"sources=[{entry}]"])
    with pytest.raises(ConfigError, match="sources"):
        sample_settings(config, config.sources[0])


def test_statistics_have_a_working_folder_of_their_own(tmp_path: Path) -> None:
    config = EvaluateConfig(stats=str(tmp_path / "coco.safetensors"), real="images")
    assert config.out_dir == tmp_path / "coco.safetensors.work"


def test_a_mistyped_reference_is_found_before_sampling() -> None:
    sources = [{"source": "runs/a", "name": "a"}]
    check_reference(EvaluateConfig(sources=sources, reference="a"))
    with pytest.raises(EvaluationError, match="nobody"):
        check_reference(EvaluateConfig(sources=sources, reference="nobody"))


def test_no_small_network_in_place_of_a_missing_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "small_network_of", lambda *_: pytest.fail("a small network was trained"))
    config = EvaluateConfig(samples=["x"], inception=str(tmp_path / "nowhere"), dataset=str(tmp_path))
    tools = instruments.open_tools(config, Share(0, 1, torch.device("cpu")), None)
    assert tools.network is None and "nowhere" in tools.notes["features"]


def test_folders_of_one_name_are_refused() -> None:
    folders = [SampleList(Path(path), {}, []) for path in ("a/samples", "b/samples")]
    check_names(folders[:1])
    with pytest.raises(EvaluationError, match="both named samples"):
        check_names(folders)
