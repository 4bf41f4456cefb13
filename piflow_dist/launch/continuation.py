"""What happens to the earlier training of a run folder: it is continued, refused, or set aside. Nothing of it is deleted."""

import os
import shutil
from pathlib import Path

from data_pipeline.description import load_description
from piflow_dist.checkpoint.files import (
    LATEST,
    STATE,
    CheckpointError,
    newest_complete,
    read_json,
    step_name,
    steps_on_disk,
    verify,
    write_atomic,
)
from piflow_dist.checkpoint.runs import changes_refused, none_left, read_run_config, resolve_checkpoint
from piflow_dist.config import Config, ConfigError, changed_keys, require
from piflow_dist.models.pretrained import open_teacher
from piflow_dist.tracking.journal import METRICS, RUN_ID, TRACKING
from piflow_dist.tracking.secrets import mask

OF_A_RUN = ("checkpoints", "config.yaml", METRICS, RUN_ID, TRACKING, "logs", "evaluation")


def newest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that this run would continue from, judged by file sizes (the processes check the hashes)."""
    if config.checkpoint.goes_back:
        return chosen_checkpoint(config)
    return (
        newest_complete(Path(config.run_dir) / "checkpoints", contents=False)[0] if config.checkpoint.resume else None
    )


def chosen_checkpoint(config: Config) -> Path:
    """The one that checkpoint.resume=STEP or PATH names. Raises ConfigError where it is not there or not whole."""
    chosen, folder = config.checkpoint.resume, Path(config.run_dir) / "checkpoints"
    if isinstance(chosen, str):
        path = resolve_checkpoint(chosen, "checkpoint.resume")
    else:
        path = folder / step_name(chosen)
        steps = ", ".join(str(step) for step in reversed(steps_on_disk(folder))) or "none"
        require(path.is_dir(), f"checkpoint.resume={chosen}: {folder} has no such step. There are: {steps}.")
    try:
        # With the hashes: the processes would pass over a damaged one, and go on from another than was asked for.
        verify(path)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume={chosen} cannot be continued: {error} Choose another one.") from error
    return path


def check_continuation(config: Config) -> None:
    """Raise ConfigError where the newest checkpoint of run_dir is of another training than `config` asks for."""
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:
        check_unreadable(config)
        return
    ways_out = f"Choose another run_dir={config.run_dir}_2 or so, or set the earlier training aside with checkpoint.resume=false."
    refused = changes_refused(read_run_config(checkpoint), config)
    require(
        not refused,
        f"run_dir={config.run_dir} holds a training at step {step_of(checkpoint)} that cannot go on with "
        f"{'; '.join(refused)}: it would be another one. {ways_out}",
    )
    state = read_json(checkpoint / STATE)
    data = load_description(config.data.root).fingerprint
    require(
        state["data"]["dataset"] == data,
        f"data.root={config.data.root} (fingerprint {data[:12]}) is not the data that {checkpoint} was trained on "
        f"({state['data']['dataset'][:12]}): its position in the data means nothing there. {ways_out}",
    )
    if config.distils:
        teacher = open_teacher(config).fingerprint()
        require(
            state["teacher"] == teacher,
            f"distill.teacher={config.distill.teacher} (fingerprint {teacher[:12]}) is not the teacher that {checkpoint} "
            f"was trained with ({str(state['teacher'])[:12]}). Give that one. {ways_out}",
        )


def check_unreadable(config: Config) -> None:
    """Checkpoints of which none can be used must not be passed over as if there were none."""
    folder = Path(config.run_dir) / "checkpoints"
    if not config.checkpoint.resume or not steps_on_disk(folder):
        return
    raise ConfigError(none_left(config.run_dir, newest_complete(folder, contents=False)[1]))


def describe_continuation(config: Config) -> list[str]:
    """What the launcher says about the earlier training."""
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:
        return [] if config.init_from is None else [f"{config.run_dir} starts from the student in {config.init_from}."]
    verb = "goes back to" if config.checkpoint.goes_back else "goes on from"
    lines = [
        f"{config.run_dir} {verb} step {step_of(checkpoint)} of {config.train.steps}, if its files are whole (their hashes are read next)."
    ]
    if step_of(checkpoint) >= config.train.steps:
        lines = [
            f"{config.run_dir} is at step {step_of(checkpoint)} already: nothing to do if its files are whole. train.steps=N trains longer."
        ]
    if not config.checkpoint.goes_back:
        lines += newest_complete(Path(config.run_dir) / "checkpoints", contents=False)[1]
    changed = changed_keys(read_run_config(checkpoint), config)
    return lines + [
        mask(f"changed since step {step_of(checkpoint)}: {key}: {old} -> {new}") for key, (old, new) in changed.items()
    ]


def keep_micro_batch(config: Config) -> list[str]:
    """Go on in micro-batches of the size so far where train.micro_batch_size leaves it open; what to say of it.

    Noise is drawn per micro-batch and seeded by its place in the global batch: in pieces of the same size another number of
    processes trains on the same noise, in others on other noise.
    """
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:
        return []
    _, before = read_run_config(checkpoint).train.accumulation(read_json(checkpoint / STATE)["dp_size"])
    dp_size = config.launch.processes // config.parallel.tp
    _, now = config.train.accumulation(dp_size)
    if now == before:
        return []
    if config.train.micro_batch_size is None and (config.train.batch_size // dp_size) % before == 0:
        config.train.micro_batch_size = before
        return [
            f"train.micro_batch_size={before}, as before: {config.launch.processes} processes then see the same noise."
        ]
    return [
        f"Micro-batches of {now} images instead of {before}: the noise from here on is other noise, and so are the losses. "
        f"train.micro_batch_size={before} would keep it, where each process has a multiple of {before} images a step."
    ]


def set_aside(config: Config) -> Path | None:
    """Move what is not to be continued to run_dir/previous_N, a run folder too; None where there is nothing of it.

    checkpoint.resume=false: all of an earlier training. STEP or PATH: its later checkpoints (from PATH's step on where PATH lies
    elsewhere, which then becomes one of run_dir's: linked, or copied from another disk); a copy of the metrics goes with them.
    """
    run_dir = Path(config.run_dir)
    if config.checkpoint.goes_back:
        return go_back(run_dir, chosen_checkpoint(config))
    found = [run_dir / name for name in OF_A_RUN if (run_dir / name).exists()]
    if config.checkpoint.resume or not found:
        return None
    target = next_previous(run_dir)
    for path in found:
        os.replace(path, target / path.name)
    return target


def go_back(run_dir: Path, chosen: Path) -> Path | None:
    folder, step = run_dir / "checkpoints", step_of(chosen)
    lies_here = chosen.resolve() == (folder / step_name(step)).resolve()
    later = [folder / step_name(found) for found in steps_on_disk(folder) if found > step - (not lies_here)]
    target = None
    if later:
        target = next_previous(run_dir)
        (target / "checkpoints").mkdir()
        for name in (METRICS, "config.yaml"):
            if (run_dir / name).exists():
                shutil.copyfile(run_dir / name, target / name)
        # MLflow holds what is set aside: what follows is another run there.
        for name in (RUN_ID, TRACKING):
            if (run_dir / name).exists():
                os.replace(run_dir / name, target / name)
        for path in later:
            # The newest moves first: a kill in between leaves a shorter training, not one with a gap.
            os.replace(path, target / "checkpoints" / path.name)
    if not lies_here:
        adopt(chosen, folder, step)
    write_atomic(folder / LATEST, step_name(step) + "\n")
    return target


def adopt(chosen: Path, folder: Path, step: int) -> None:
    """Make a checkpoint that lies elsewhere one of this run's: whole or not at all."""
    temporary = folder / f".{step_name(step)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(chosen, temporary, copy_function=link_or_copy)
    os.replace(temporary, folder / step_name(step))


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # checkpoints are never written to again
    except OSError:
        shutil.copyfile(source, target)


def next_previous(run_dir: Path) -> Path:
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    target = run_dir / f"previous_{number}"
    target.mkdir()
    return target


def step_of(checkpoint: Path) -> int:
    """From its contents: a folder that was moved may have another name."""
    return read_json(checkpoint / STATE)["step"]
