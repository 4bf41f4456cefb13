"""docs/models.md's way to ImageNet's FID: its commands are accepted, and each reads what the one before has written."""

import shlex
from pathlib import Path

from data_pipeline.prepare_settings import PrepareConfig
from data_pipeline.settings import parse_settings
from piflow_dist.config import load_config
from piflow_dist.evaluation.settings import load_evaluation
from piflow_dist.sampling.settings import SampleConfig

DOCS = Path(__file__).parents[2] / "docs"


def commands_of(page: str, heading: str) -> list[list[str]]:
    """Arguments of the `python tools/...` lines below a heading, the tool's name first."""
    section = (DOCS / page).read_text().split(f"{heading}\n")[1].split("\n#")[0]
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python tools/")]


def test_the_commands_for_fid_follow_from_each_other() -> None:
    (training_set,) = commands_of("data.md", "## ImageNet")
    trained_on = parse_settings(PrepareConfig, training_set[1:])
    prepare, statistics, sample, compare = commands_of("models.md", "### FID")
    tools = [command[0] for command in (prepare, statistics, sample, compare)]
    assert tools == [f"tools/{name}.py" for name in ("prepare_data", "evaluate", "sample", "evaluate")]

    photographs = parse_settings(PrepareConfig, prepare[1:])
    assert photographs.latents == "online" and photographs.like == trained_on.out
    for same in ("path", "captions", "resolution", "max_aspect"):
        assert getattr(photographs, same) == getattr(trained_on, same), same

    made, samples, result = (
        load_evaluation(statistics[1:]),
        load_config(sample[1:], SampleConfig, "sample"),
        load_evaluation(compare[1:]),
    )
    assert (made.real, made.inception) == (photographs.out, result.inception)
    assert samples.source == load_config(["experiment=imagenet_gmm_1nfe"]).run_dir
    assert 1000 * samples.images_per_prompt == 50_000
    assert (result.samples, result.real) == ([samples.out], made.stats)
