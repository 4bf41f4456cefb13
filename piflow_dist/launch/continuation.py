"""What happens to the earlier training of a run folder: it is continued, refused, or set aside. Nothing of it is deleted."""

import os
from pathlib import Path

from data_pipeline.description import load_description
from piflow_dist.checkpoint.files import STATE, newest_complete, read_json, steps_on_disk
from piflow_dist.checkpoint.runs import changes_refused, read_run_config
from piflow_dist.config import Config, ConfigError, changed_keys, require
from piflow_dist.models.pretrained import open_teacher
from piflow_dist.tracking.tracker import METRICS, RUN_ID

OF_A_RUN = ("checkpoints", "config.yaml", METRICS, RUN_ID, "logs")


def newest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that this run would continue from, judged by file sizes (the processes check the hashes)."""
    return (
        newest_complete(Path(config.run_dir) / "checkpoints", contents=False)[0] if config.checkpoint.resume else None
    )


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
    problems = newest_complete(folder, contents=False)[1]
    raise ConfigError(
        f"run_dir={config.run_dir} has checkpoints, but none that can be continued. {' '.join(problems)} Restore one, or "
        "choose another run_dir, or set them aside with checkpoint.resume=false."
    )


def describe_continuation(config: Config) -> list[str]:
    """What the launcher says about the earlier training."""
    checkpoint = newest_checkpoint(config)
    if checkpoint is None:
        return [] if config.init_from is None else [f"{config.run_dir} starts from the student in {config.init_from}."]
    lines = [f"{config.run_dir} goes on from step {step_of(checkpoint)} of {config.train.steps}."]
    if step_of(checkpoint) >= config.train.steps:
        lines = [
            f"{config.run_dir} is at step {step_of(checkpoint)} already: nothing to do. train.steps=N trains longer."
        ]
    changed = changed_keys(read_run_config(checkpoint), config)
    return lines + [
        f"changed since step {step_of(checkpoint)}: {key}: {old} -> {new}" for key, (old, new) in changed.items()
    ]


def set_aside(config: Config) -> Path | None:
    """With checkpoint.resume=false: move what an earlier training left in run_dir to run_dir/previous_N, a run folder too."""
    run_dir = Path(config.run_dir)
    found = [run_dir / name for name in OF_A_RUN if (run_dir / name).exists()]
    if config.checkpoint.resume or not found:
        return None
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    target = run_dir / f"previous_{number}"
    target.mkdir()
    for path in found:
        os.replace(path, target / path.name)
    return target


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
