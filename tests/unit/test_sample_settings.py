"""What tools/sample.py refuses of one kind of student and takes of another."""

import pytest

from piflow_dist.config import ConfigError, load_config
from piflow_dist.sampling.settings import SampleConfig, refuse_idle_keys


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        ("demo_dx", "a DX policy's outputs"),
        ("demo_meanflow", "a mean policy"),
        ("demo_shortcut", "a mean policy"),
        ("demo_gmm", None),
        ("demo_teacher", None),
    ],
)
def test_a_shift_is_refused_in_the_name_of_the_policy(experiment: str, said: str | None) -> None:
    config, run = SampleConfig(source="run", out="out", shift=2.0), load_config([f"experiment={experiment}"])
    if said is None:
        refuse_idle_keys(config, run)
        return
    with pytest.raises(ConfigError, match=f"shift=2.0: {said}"):
        refuse_idle_keys(config, run)
