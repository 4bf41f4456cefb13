"""Sample: python tools/sample.py source=RUN out=DIR [prompts=FILE nfe=4 | steps=100 guidance=2] [key=value ...].

source: a run, a checkpoint, or an export with dataset=DIR and, for an adapter, base=TEACHER (docs/export.md). The same
command makes only the images that are missing. launch.processes=N spreads them, parallel.tp=T splits the model.
"""

import sys

from piflow_dist.cli import run_tool
from piflow_dist.config import load_config
from piflow_dist.help import explain_keys
from piflow_dist.sampling import run
from piflow_dist.sampling.settings import SampleConfig


def sample(overrides: list[str]) -> None:
    run.sample(load_config(overrides, SampleConfig, "sample"))


if __name__ == "__main__":
    run_tool(sample, sys.argv[1:], f"{__doc__}\nKeys and defaults:\n{explain_keys(SampleConfig)}")
