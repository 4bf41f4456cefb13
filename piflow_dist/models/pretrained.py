"""Models from our checkpoints."""

from pathlib import Path

from torch import Tensor

from piflow_dist.checkpoint.reader import read_weights
from piflow_dist.config import Config
from piflow_dist.launch.preflight import read_run_config, resolve_checkpoint
from piflow_dist.models.heads import VelocityHead, build_policy_head
from piflow_dist.models.qwen_image import QwenImage, build_tied


def load_teacher(config: Config) -> QwenImage:
    """The teacher of a distillation, averaged weights, on the CPU in fp32."""
    checkpoint = resolve_checkpoint(config.distill.teacher, "distill.teacher")
    return load_model(checkpoint, read_run_config(checkpoint))


def load_model(checkpoint: Path, config: Config, ema: bool = True) -> QwenImage:
    """The model of a run's checkpoint on the CPU in fp32: a teacher or a student, as the run's config says.

    Raises CheckpointError for damaged files and ValueError where the weights are not those of the configured model.
    """
    width, channels = config.model.width, config.model.latent_channels
    if config.mode == "tied":
        model = build_tied(load_teacher(config), config.model, config.policy, config.lora, config.train.seed)
    elif config.distils:
        model = QwenImage(config.model, build_policy_head(width, channels, config.policy))
    else:
        model = QwenImage(config.model, VelocityHead(width, channels))
    load_trained(model, read_weights(checkpoint, ema), str(checkpoint))
    return model


def load_trained(model: QwenImage, weights: dict[str, Tensor], source: str) -> None:
    """Copy trained parameters into a model. The text branch's unused end is frozen, and in no checkpoint."""
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [f"missing: {', '.join(sorted(expected - set(weights)))}"] if expected - set(weights) else []
    problems += [f"unknown: {', '.join(sorted(set(weights) - expected))}"] if set(weights) - expected else []
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems += [
        f"{name} is {tuple(value.shape)} instead of {shapes[name]}"
        for name, value in weights.items()
        if name in expected and tuple(value.shape) != shapes[name]
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}.")
    model.load_state_dict(weights, strict=False)
