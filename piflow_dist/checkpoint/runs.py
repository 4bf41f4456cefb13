"""Run folders: their newest checkpoint, the configuration that wrote it, and what of it a continued run must keep."""

import logging
from pathlib import Path

from piflow_dist.checkpoint.files import STATE, CheckpointError, newest_complete, read_json
from piflow_dist.config import Config, ConfigError, changed_keys, config_from, first_line, require

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "run_dir",
    "checkpoint.",
    "launch.",
    "parallel.",
    "tracking.",
    "evaluation.",
    "cluster",
    "cluster.",
    "watchdog.",
    "train.steps",
    "train.micro_batch_size",
    "train.max_skipped",
    "optim.",
    "ema.",
    "distill.stack_teacher_states",
    # Files may have moved; that they are the same ones is checked by content.
    "distill.teacher",
    "data.root",
)
"""Keys, and groups of keys, that a run may change when it goes on. Of all others its checkpoints would not be one training."""
KEPT_OF_OPTIM = "optim.type"  # the saved moments are its own


def resolve_checkpoint(source: str, option: str) -> Path:
    """A checkpoint folder, or the newest complete checkpoint of a run folder; newer damaged ones are named in the log."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return path
    require(path.is_dir(), f"{option}={source} does not exist. Give a run folder or a checkpoint folder.")
    checkpoint, problems = newest_complete(path / "checkpoints")
    detail = " ".join(problems)
    require(
        checkpoint is not None, f"{option}={source} has no complete checkpoint under {path / 'checkpoints'}. {detail}"
    )
    for problem in problems:
        log.warning("%s=%s: %s Using %s.", option, source, problem, checkpoint.name)
    return checkpoint


def none_left(run_dir: str, problems: list[str]) -> str:
    """Checkpoints of which none can be used must not be passed over as if there were none."""
    return (
        f"run_dir={run_dir} has checkpoints, but none that can be continued. {' '.join(problems)} Restore one, or choose another "
        "run_dir, or set them aside with checkpoint.resume=false."
    )


def read_run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint, as saved in it."""
    try:
        return config_from(read_json(checkpoint / STATE)["config"])
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint / STATE} holds no usable settings: {first_line(error)}") from error


def changes_refused(before: Config, now: Config) -> list[str]:
    """'key=new (was old)' of every setting that makes `now` another training than the one that `before` began."""
    return [
        f"{key}={new} (was {old})"
        for key, (old, new) in changed_keys(before, now).items()
        if key == KEPT_OF_OPTIM
        or not any(key == free or (free[-1] == "." and key.startswith(free)) for free in MAY_CHANGE)
    ]
