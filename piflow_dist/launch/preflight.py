"""What can be known to be wrong before a process is started: data, teacher, folders."""

import os
from pathlib import Path

from data_pipeline.codec import vae_fingerprint
from data_pipeline.description import load_description
from piflow_dist.checkpoint.files import STATE, read_json
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import Config, ConfigError, ModelConfig, changed_keys, require
from piflow_dist.launch.continuation import check_continuation, newest_checkpoint
from piflow_dist.launch.local import check_devices, check_port
from piflow_dist.models.architecture import plan_model
from piflow_dist.models.initial import open_initial
from piflow_dist.models.pretrained import DiffusersWeights, diffusers_folder, plan_training, read_diffusers_config
from piflow_dist.models.weights import check_fits


def check_run(config: Config) -> None:
    """Raise ConfigError where the run could not work on this machine."""
    check_request(config)
    check_port(config.launch.port)
    check_devices(config.launch)


def check_request(config: Config) -> None:
    """Raise ConfigError where the run could not work on any machine that sees these files."""
    check_writable(Path(config.run_dir))
    check_data(config)
    if config.distils:
        check_teacher(config)
    check_continuation(config)
    if config.init_from is not None and newest_checkpoint(config) is None:
        check_initial(config)


def check_writable(folder: Path) -> None:
    """Leaves nothing behind: the request may yet be refused."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        probe = existing / f".write_test_{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
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
    pooled = config.model.pooled_projection_dim
    require(
        description.pooled_dim in (None, pooled),
        f"{config.data.root} holds pooled prompts of width {description.pooled_dim}, the model wants "
        f"model.pooled_projection_dim={pooled}. Prepare the data with this model's prompt encoder.",
    )
    largest = max(bucket.samples for bucket in description.buckets(config.data.split))
    require(
        largest >= config.train.batch_size,
        f"{config.data.root} has {largest} samples in the largest bucket of split {config.data.split}, fewer than one "
        f"batch of train.batch_size={config.train.batch_size}. Use a smaller batch.",
    )
    require(
        description.latents != "none" or config.objective == "imitation_datafree",
        f"{config.data.root} holds prompts only, objective={config.objective} needs images. Set objective=imitation_datafree.",
    )
    require(
        description.latents == "online" or not config.data.augment,
        f"data.augment=true changes pixels, but {config.data.root} holds latents. Prepare it with latents=online.",
    )


def check_teacher(config: Config) -> None:
    source = config.distill.teacher
    folder = diffusers_folder(source)
    model = check_teacher_run(config) if folder is None else read_diffusers_config(folder)
    changed = changed_keys(config.model, model)
    different = [f"model.{key}={theirs}" for key, (_, theirs) in changed.items()]
    require(
        not different,
        f"distill.teacher={source} has {', '.join(different)}, this run {', '.join(str(ours) for ours, _ in changed.values())}. Choose the same model group.",
    )
    check_vae(config)
    try:
        if folder is not None:
            check_fits(plan_model(model), DiffusersWeights(folder, model))
        plan_training(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"distill.teacher={source}: {error}") from error


def check_vae(config: Config) -> None:
    """A teacher that is a whole pipeline has a VAE of its own: the data's latents have to be that one's."""
    own = Path(config.distill.teacher) / "vae"
    if not (own / "config.json").is_file():
        return
    used = load_description(config.data.root).codec
    require(
        "path" in used,
        f"data.root={config.data.root} was made with codec={used['kind']}, distill.teacher={config.distill.teacher} has a VAE. "
        "Prepare the data with it.",
    )
    found = vae_fingerprint(own)
    require(
        used.get("weights") in (None, found),  # sets of earlier versions do not say
        f"data.root={config.data.root} holds latents of another VAE (fingerprint {str(used.get('weights'))[:12]}) than that of "
        f"distill.teacher={config.distill.teacher} ({found[:12]}). Prepare the data with the teacher's.",
    )


def check_initial(config: Config) -> None:
    try:
        plan_training(config, open_initial(config).weights)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"init_from={config.init_from}: {error}") from error


def check_teacher_run(config: Config) -> ModelConfig:
    """The model of a teacher that was trained here."""
    checkpoint = resolve_checkpoint(config.distill.teacher, "distill.teacher")
    require(
        Path(config.run_dir).resolve() not in [checkpoint.resolve(), *checkpoint.resolve().parents[:2]],
        f"run_dir={config.run_dir} is the folder of distill.teacher={config.distill.teacher}: the student would take the "
        "teacher's place. Choose another run_dir.",
    )
    teacher, trained_on = read_run_config(checkpoint), read_json(checkpoint / STATE)["trained_on"]
    require(
        teacher.objective == "flow_matching",
        f"distill.teacher={config.distill.teacher} was trained with objective={teacher.objective}. "
        "A teacher predicts velocities: give a run of objective=flow_matching.",
    )
    data = load_description(config.data.root)
    for option, mine in (("codec", data.codec), ("prompt_encoder", data.prompt_encoder)):
        require(
            trained_on[option] == dict(mine),
            f"data.root={config.data.root} was made with the {option} {dict(mine)}, distill.teacher={config.distill.teacher} "
            f"was trained on {trained_on[option]}. Prepare the data with the teacher's {option}.",
        )
    if teacher.data.caption_dropout == 0:
        require(
            config.distill.guidance.scale == 1,
            f"distill.guidance.scale={config.distill.guidance.scale} needs the unconditional velocity, but the teacher "
            "was trained with data.caption_dropout=0. Set distill.guidance.scale=1.",
        )
    return teacher.model
