"""What can be known to be wrong before a process is started: data, teacher, folders."""

import os
from pathlib import Path

from data_pipeline.description import load_description
from piflow_dist.checkpoint.files import STATE, newest_complete, read_json
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import Config, ConfigError, ModelConfig, require
from piflow_dist.models.pretrained import DiffusersWeights, diffusers_folder, open_teacher, read_diffusers_config
from piflow_dist.models.qwen_image import plan_model
from piflow_dist.models.weights import check_fits


def check_run(config: Config) -> None:
    """Raise ConfigError where the run could not work on this machine."""
    check_writable(Path(config.run_dir))
    check_data(config)
    if config.distils:
        check_teacher(config)
        check_same_teacher(config)


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


def check_teacher(config: Config) -> None:
    source = config.distill.teacher
    folder = diffusers_folder(source)
    model = check_teacher_run(config) if folder is None else read_diffusers_config(folder)
    require(
        model == config.model,
        f"distill.teacher={source} has the model {model}, this run {config.model}. Choose the same model group.",
    )
    if folder is not None:
        try:
            check_fits(plan_model(model), DiffusersWeights(folder))
        except ValueError as error:
            raise ConfigError(f"distill.teacher={source}: {error}") from error


def check_same_teacher(config: Config) -> None:
    """A run that goes on must have the teacher that it began with: adapters and a policy head fit no other weights."""
    folder = Path(config.run_dir) / "checkpoints"
    checkpoint = newest_complete(folder)[0] if config.checkpoint.resume else None
    if checkpoint is None:
        return
    began_with, found = read_json(checkpoint / STATE)["teacher"], open_teacher(config).fingerprint()
    require(
        began_with == found,
        f"distill.teacher={config.distill.teacher} (fingerprint {found[:12]}) is not the teacher that {checkpoint} was "
        f"trained with ({str(began_with)[:12]}). Give that one, or another run_dir, or checkpoint.resume=false.",
    )


def check_teacher_run(config: Config) -> ModelConfig:
    """The model of a teacher that was trained here."""
    teacher = read_run_config(resolve_checkpoint(config.distill.teacher, "distill.teacher"))
    require(
        teacher.objective == "flow_matching",
        f"distill.teacher={config.distill.teacher} was trained with objective={teacher.objective}. "
        "A teacher predicts velocities: give a run of objective=flow_matching.",
    )
    if teacher.data.caption_dropout == 0:
        require(
            config.distill.guidance.scale == 1,
            f"distill.guidance.scale={config.distill.guidance.scale} needs the unconditional velocity, but the teacher "
            "was trained with data.caption_dropout=0. Set distill.guidance.scale=1.",
        )
    return teacher.model
