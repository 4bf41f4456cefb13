"""Sample: python tools/sample.py source=RUN out=DIR [prompts=FILE nfe=4 | steps=100 guidance=2] [key=value ...].

source: a run, a checkpoint, or an export with dataset=DIR and, for an adapter, base=TEACHER (docs/export.md). The same
command makes only the images that are missing.
"""

import sys
from pathlib import Path

from piflow_dist.cli import run_tool
from piflow_dist.config import load_config, save_config
from piflow_dist.help import explain_keys
from piflow_dist.launch.local import run_workers
from piflow_dist.launch.lock import only_user
from piflow_dist.sampling.gather import gather, prepare_folder
from piflow_dist.sampling.settings import SampleConfig, build_request


def sample(overrides: list[str]) -> None:
    config = load_config(overrides, SampleConfig, "sample")
    request = build_request(config)
    out = Path(config.out)
    with only_user(out.with_name(f".{out.name}.lock"), f"out={out}"):
        if prepare_folder(request):
            print(f"{out}: all {len(request.prompts)} images are there.")
            return
        save_config(config, out / "settings.yaml")
        run_workers("piflow_dist.sampling.sampler", [str(out / "settings.yaml")], config.launch, out / "logs")
        gather(request)
    print(f"{out}: {len(request.prompts)} images.")


if __name__ == "__main__":
    run_tool(sample, sys.argv[1:], f"{__doc__}\nKeys and defaults:\n{explain_keys(SampleConfig)}")
