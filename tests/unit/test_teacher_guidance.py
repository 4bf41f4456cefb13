"""A teacher is sampled under the guidance that its student imitates: scale and interval of noise levels.

The network's velocity is 1 with a prompt and 0 without: an image moves by the guidance scale where guidance acts, and by 1 elsewhere.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.config import Config, ConfigError, DataConfig, EvaluationConfig, ModelConfig, load_config
from piflow_dist.distill.objectives import Batch
from piflow_dist.evaluation.during import TrainingEvaluation
from piflow_dist.evaluation.settings import load_evaluation, sample_settings
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.sampling.gather import prepare_folder
from piflow_dist.sampling.sampler import Sampler
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, refuse_idle_keys

SCALE, INTERVAL, STEPS = 3.2, [0.0, 0.7], 10
TEACHER = Config(run_dir="run", objective="flow_matching", data=DataConfig(root="data"))
# Of the ten steps from sigma = 1 those at 0.7 and below are guided: seven.
MOVED = -(3 * 1 + 7 * SCALE) / STEPS


def network(x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, mask_BL: Tensor, guidance_B: None) -> Tensor:
    return torch.zeros_like(x_BCHW) + text_BLD[:, 0, :1, None, None]


def batch() -> Batch:
    """One image whose noise is 0 and whose prompt is 1; the empty prompt is 0."""
    return Batch(torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))


def sample_config(*overrides: str) -> SampleConfig:
    return load_config(["source=run", "out=out", f"steps={STEPS}", *overrides], SampleConfig, "sample")


def test_the_sampler_keeps_to_the_interval() -> None:
    config = sample_config(f"guidance={SCALE}", "guidance_interval=[0,0.7]")
    request = SampleRequest(config, TEACHER, Path("run"), None, [])
    cache = SimpleNamespace(read=lambda prompt: torch.zeros(1, 1))
    latents_BCHW = Sampler(request, network, cache, torch.device("cpu"))._teacher(
        torch.zeros(1, 4, 2, 2), batch(), FlowSchedule(shift=1.0)
    )
    assert_close(latents_BCHW, torch.full((1, 4, 2, 2), MOVED))
    assert request.settings()["guidance_interval"] == INTERVAL


def test_evaluation_beside_a_teachers_training_keeps_to_the_interval() -> None:
    evaluation = EvaluationConfig(guidance=SCALE, guidance_interval=INTERVAL, teacher_steps=STEPS)
    config = Config(run_dir="run", objective="flow_matching", data=DataConfig(root="data"), evaluation=evaluation)
    found = TrainingEvaluation(config, None, FlowSchedule(shift=1.0), None)._sample(network, batch())
    assert_close(found, torch.full((1, 4, 2, 2), MOVED))


def test_a_source_of_an_evaluation_has_it_too() -> None:
    source = "{source:run,guidance:3.2,guidance_interval:[0,0.7],name:teacher}"
    config = load_evaluation([f"sources=[{source}]"])
    assert sample_settings(config, config.sources[0]).guidance_interval == INTERVAL


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("guidance=3", "guidance_interval=[0.7]"), "guidance_interval=[0.7] must be two numbers"),
        (
            ("guidance=3", "guidance_interval=[0.7,0.2]"),
            "guidance_interval=[0.7, 0.2] is not an interval inside [0, 1]",
        ),
        (("guidance=3", "guidance_interval=[0,1.5]"), "guidance_interval=[0.0, 1.5] is not an interval inside [0, 1]"),
        (("guidance_interval=[0,0.7]",), "guidance_interval=[0.0, 0.7] with guidance=1.0, which is none"),
    ],
)
def test_what_is_no_interval_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        sample_config(*overrides)
    assert said in str(error.value)


def test_sources_that_have_no_interval_refuse_one() -> None:
    config = SampleConfig(source="run", out="out", guidance=SCALE, guidance_interval=INTERVAL)
    refuse_idle_keys(config, TEACHER)
    distilled = dataclasses.replace(TEACHER)
    distilled.model = ModelConfig(guidance_embeds=True)  # as of a published teacher
    with pytest.raises(ConfigError, match=r"guidance_interval=\[0.0, 0.7\] acts on two velocities"):
        refuse_idle_keys(config, distilled)
    config.guidance = 1.0
    with pytest.raises(ConfigError, match=r"guidance_interval=\[0.0, 0.7\] is for teachers"):
        refuse_idle_keys(config, load_config(["experiment=demo_gmm"]))


def test_a_folder_of_an_earlier_version_goes_on_where_guidance_acts_everywhere(tmp_path: Path) -> None:
    def request(interval: list[float]) -> SimpleNamespace:
        wanted = {"guidance": SCALE, "guidance_interval": interval}
        config = SimpleNamespace(latents=False, overwrite=False)
        return SimpleNamespace(out=tmp_path, config=config, identity=lambda: wanted, missing=lambda: [])

    (tmp_path / "request.json").write_text(json.dumps({"guidance": SCALE}))
    with pytest.raises(ConfigError, match=r"guidance_interval: \[0.0, 1.0\] -> \[0.0, 0.7\]"):
        prepare_folder(request(INTERVAL))
    assert not prepare_folder(request([0.0, 1.0])), "it is not finished"
