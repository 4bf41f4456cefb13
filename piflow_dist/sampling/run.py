"""Sampling as one call: what tools/sample.py does, for other code that wants a folder of images."""

import dataclasses
import json
import logging
import os
from itertools import groupby
from pathlib import Path

from piflow_dist.checkpoint.files import MANIFEST, read_json, write_atomic
from piflow_dist.checkpoint.runs import resolve_checkpoint
from piflow_dist.config import ConfigError, read_config, save_config
from piflow_dist.launch.local import WorkerFailed, check_devices, check_port, run_workers
from piflow_dist.launch.lock import only_user
from piflow_dist.sampling.gather import REQUEST, changes, check_folder, gather, is_finished, prepare_folder
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request

log = logging.getLogger(__name__)

SETTINGS, PROMPTS = "settings.yaml", "prompts.jsonl"


def sample(config: SampleConfig) -> Path:
    """Make the images of a request that are missing, in config.launch.processes processes. Returns the folder.

    Raises ConfigError for what cannot be sampled, and WorkerFailed where a process failed or some images could not be made
    (the folder is finished without them then). launch.dry_run=true only checks, and says what would be made.
    """
    request = open_request(config)
    out = request.out
    if config.launch.dry_run:
        check_port(config.launch.port)
        check_devices(config.launch)
        print(describe_plan(request))
        return out
    with only_user(lock_of(out), f"out={out}"):
        if prepare_folder(request):
            print(f"{out}: all {len(request.images)} images are there.")
            return out
        if request.missing():
            run_workers("piflow_dist.sampling.sampler", [str(write_settings(request))], config.launch, out / "logs")
        finish(request)
    print(f"{out}: {len(request.images)} images.")
    return out


def describe_plan(request: SampleRequest) -> str:
    """What would be made, for launch.dry_run=true. Raises ConfigError as making it would; writes nothing."""
    images = len(request.images)
    finished, changed = check_folder(request, request.identity())
    if finished:
        return f"{request.out}: all {images} images are there."
    missing = images if changed else len(request.missing())
    return f"Everything checked; {request.config.launch.processes} processes would make {missing} of {images} images in {request.out}."


def lock_of(out: Path) -> Path:
    """Beside the folder, which overwrite=true removes."""
    return out.with_name(f".{out.name}.lock")


def open_request(config: SampleConfig) -> SampleRequest:
    """The request, of the checkpoint that images there are of where they are not all made.

    So the same command goes on although the training has saved a newer one meanwhile, and a requeued job neither is refused
    for that nor removes what its first attempt made. Raises ConfigError for what cannot be sampled.
    """
    again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if again:
        config = dataclasses.replace(config, overwrite=False)
    out = Path(config.out)
    begun = begun_request(config) if again or not (is_finished(out) or config.overwrite) else None
    return begun or build_request(config)


def begun_request(config: SampleConfig) -> SampleRequest | None:
    """The same request of the checkpoint that `out` was begun with; None where that is gone, or another request's, or not of `source`."""
    settings, identity = Path(config.out) / SETTINGS, Path(config.out) / REQUEST
    if not (settings.is_file() and identity.is_file()):
        return None
    try:
        checkpoint = Path(read_config(settings, SampleConfig).source)
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}. Remove it to go on, or choose another folder.") from error
    if Path(config.source).resolve() not in checkpoint.resolve().parents or not (checkpoint / MANIFEST).is_file():
        return None
    request = build_request(dataclasses.replace(config, source=str(checkpoint)))
    if changes(request.identity(), read_json(identity)):
        return None
    newest = resolve_checkpoint(config.source, "source")
    if newest.resolve() != checkpoint.resolve():
        log.warning("out=%s goes on with %s, not with the newer %s.", config.out, checkpoint, newest.name)
    return request


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
