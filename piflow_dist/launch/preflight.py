"""What can be known to be wrong before a process is started: data, teacher, folders."""

import os
from pathlib import Path

from data_pipeline.description import load_description
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.config import Config, ConfigError, read_config, require


def check_run(config: Config) -> None:
    """Raise ConfigError where the run could not work on this machine."""
    check_writable(Path(config.run_dir))
    check_data(config)
    if config.distils:
        check_teacher(config)


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written: {error.strerror}. Choose another run_dir.") from error


def check_data(config: Config) -> None:
    try:
        description = load_description(config.data.root)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.root={config.data.root}: {error}") from error
    splits = description.splits
    require(
        config.data.split in splits,
        f"data.split={config.data.split} is not in {config.data.root}. It has: {', '.join(sorted(splits))}.",
    )
    channels = description.latent_channels
    require(
        channels == config.model.latent_channels,
        f"{config.data.root} holds latents of {channels} channels, the model wants "
        f"model.latent_channels={config.model.latent_channels}. Prepare the data with this model's codec.",
    )
    dim = description.prompt_dim
    require(
        dim == config.model.joint_attention_dim,
        f"{config.data.root} holds prompt embeddings of width {dim}, the model wants "
        f"model.joint_attention_dim={config.model.joint_attention_dim}. Prepare the data with this model's prompt encoder.",
    )
    samples = splits[config.data.split]
    require(
        samples >= config.train.batch_size,
        f"{config.data.root} has {samples} samples in split {config.data.split}, fewer than one batch of "
        f"train.batch_size={config.train.batch_size}. Use a smaller batch.",
    )


def resolve_checkpoint(source: str, option: str) -> Path:
    """A checkpoint folder, or the newest complete checkpoint of a run folder."""
    path = Path(source)
    if (path / "manifest.json").is_file():
        return path
    require(path.is_dir(), f"{option}={source} does not exist. Give a run folder or a checkpoint folder.")
    checkpoint, problems = newest_complete(path / "checkpoints")
    detail = " ".join(problems)
    require(
        checkpoint is not None, f"{option}={source} has no complete checkpoint under {path / 'checkpoints'}. {detail}"
    )
    return checkpoint


def check_teacher(config: Config) -> None:
    checkpoint = resolve_checkpoint(config.distill.teacher, "distill.teacher")
    teacher = read_run_config(checkpoint)
    require(
        teacher.objective == "flow_matching",
        f"distill.teacher={config.distill.teacher} was trained with objective={teacher.objective}. "
        "A teacher predicts velocities: give a run of objective=flow_matching.",
    )
    require(
        teacher.model == config.model,
        f"distill.teacher={config.distill.teacher} has the model {teacher.model}, this run {config.model}. "
        "Choose the same model group.",
    )
    if teacher.data.caption_dropout == 0:
        require(
            config.distill.guidance.scale == 1,
            f"distill.guidance.scale={config.distill.guidance.scale} needs the unconditional velocity, but the teacher "
            "was trained with data.caption_dropout=0. Set distill.guidance.scale=1.",
        )


def read_run_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {checkpoint} does not lie in a run folder (RUN/checkpoints/step_N).")
    return read_config(path)
