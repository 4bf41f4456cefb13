"""Sampling as one call: what tools/sample.py does, for other code that wants a folder of images."""

import dataclasses
import json
from itertools import groupby
from pathlib import Path

from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import save_config
from piflow_dist.launch.local import WorkerFailed, run_workers
from piflow_dist.launch.lock import only_user
from piflow_dist.sampling.gather import gather, prepare_folder
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request

SETTINGS, PROMPTS = "settings.yaml", "prompts.jsonl"


def sample(config: SampleConfig) -> Path:
    """Make the images of a request that are missing, in config.launch.processes processes. Returns the folder.

    Raises ConfigError for what cannot be sampled, and WorkerFailed where a process failed or some images could not be made
    (the folder is finished without them then).
    """
    request = build_request(config)
    out = request.out
    with only_user(out.with_name(f".{out.name}.lock"), f"out={out}"):
        if prepare_folder(request):
            print(f"{out}: all {len(request.images)} images are there.")
            return out
        if request.missing():
            run_workers("piflow_dist.sampling.sampler", [str(write_settings(request))], config.launch, out / "logs")
        finish(request)
    print(f"{out}: {len(request.images)} images.")
    return out


def write_settings(request: SampleRequest) -> Path:
    """For the processes. The checkpoint is named and the prompts are copied: a training beside may save a newer one
    meanwhile, and somebody may edit the file."""
    path, prompts = request.out / SETTINGS, request.out / PROMPTS
    lines = []
    for _, same in groupby(request.images, key=lambda image: image.prompt_index):
        images = list(same)
        first, seeds = images[0], [image.seed for image in images]
        line = {"prompt": first.prompt, "seeds": seeds, "height": first.height, "width": first.width}
        lines.append(json.dumps(line) + "\n")
    write_atomic(prompts, "".join(lines))
    save_config(dataclasses.replace(request.config, source=str(request.checkpoint), prompts=str(prompts)), path)
    return path


def finish(request: SampleRequest) -> None:
    """Write what belongs to the whole folder. Raises WorkerFailed where images are missing in it."""
    problem = gather(request)
    if request.config.mlflow:
        from piflow_dist.sampling.publish import publish

        publish(request)
    if problem:
        raise WorkerFailed(problem)
