"""The layout in which pi-Flow students are published: config.json and policy_config. Names of tensors are in pretrained.our_name.

Read by LakonLab's pi-Flow pipelines and by ComfyUI-piFlow; docs/export.md says what each of them takes from it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_dist.config import Config, ConfigError, ModelConfig, PolicyConfig, require

PATCHES = 4
"""Latent pixels in a token: their channels are packed, and each has a log-weight of its own."""
GM_CLASS, DX_CLASS = "GMQwenImageTransformer2DModel", "DXQwenImageTransformer2DModel"
TEACHER_CLASS = "QwenImageTransformer2DModel"
POLICY = "policy_config"
LOGSTD_LAYERS = 2
SEGMENT_SIZE, SHIFT = 1.0, 1.0  # what the published DX policy takes where policy_config is silent
IGNORED = {"checkpointing": None, "eps": 1e-4}
"""Arguments of published policies that change nothing here; eps is the one value that is built in."""


@dataclass(frozen=True)
class PublishedPolicy:
    """A policy as config.json and policy_config describe it. segment_size and shift: of a DX policy; None: not stated."""

    policy: PolicyConfig
    segment_size: float | None = None
    shift: float | None = None


def model_json(model: ModelConfig, policy: PolicyConfig | None) -> dict[str, Any]:
    """config.json of a student's folder, or without a policy of a teacher's."""
    packed = model.latent_channels * PATCHES
    shape = {
        "in_channels": packed,
        "num_layers": model.num_layers,
        "attention_head_dim": model.attention_head_dim,
        "num_attention_heads": model.num_attention_heads,
        "joint_attention_dim": model.joint_attention_dim,
        "axes_dims_rope": list(model.axes_dims_rope),
    }
    if model.guidance_embeds:
        shape["guidance_embeds"] = True
    if policy is None:
        return {
            "_class_name": TEACHER_CLASS,
            "guidance_embeds": False,
            **shape,
            "patch_size": 2,
            "out_channels": model.latent_channels,
        }
    if policy.type == "dx":
        # The class that carries it is diffusers' own, told to predict N times the channels of packed tokens.
        return {"_class_name": DX_CLASS, **shape, "patch_size": 1, "out_channels": policy.num_nodes * packed}
    return {
        "_class_name": GM_CLASS,
        **shape,
        "out_channels": packed,
        "num_gaussians": policy.num_components,
        "constant_logstd": None,
        "logstd_inner_dim": policy.logstd_inner_dim,
        "gm_num_logstd_layers": LOGSTD_LAYERS,
        "logweights_channels": PATCHES,
    }


def policy_json(config: Config) -> str:
    """`policy_config` of a run's policy: what the published policy class is called with, and `type`."""
    if config.policy.type == "gmflow":
        return json.dumps({"type": "GMFlow"})
    require(
        not config.schedule.dynamic,
        "schedule.dynamic=true: the published layout has one shift for a DX policy, and this one's depends on the image size. "
        "It cannot be exported.",
    )
    arguments = {"shift": config.schedule.shift, "type": "DX"}
    if config.policy.mode == "polynomial":  # has no segments; the older published class takes no mode
        return json.dumps({"mode": "polynomial", **arguments})
    return json.dumps({"segment_size": config.distill.base_segment, **arguments})


def read_json_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    require(isinstance(found, dict), f"{path} is not a JSON object.")
    return found


def read_student_model(path: Path, found: dict[str, Any]) -> ModelConfig:
    """The transformer's shape from a student's config.json."""
    try:
        packed, heads = found["in_channels"], found["num_attention_heads"]
        model = ModelConfig(
            num_layers=found["num_layers"],
            num_attention_heads=heads,
            attention_head_dim=found["attention_head_dim"],
            latent_channels=packed // PATCHES,
            joint_attention_dim=found["joint_attention_dim"],
            axes_dims_rope=list(found["axes_dims_rope"]),
            guidance_embeds=bool(found.get("guidance_embeds")),
        )
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}.") from error
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path} does not describe a transformer: {error}") from error
    require(packed % PATCHES == 0, f"{path}: in_channels={packed} are not 2 x 2 patches of a latent.")
    return model


def read_policy(
    path: Path, found: dict[str, Any], metadata: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> PublishedPolicy:
    """The policy of a student's folder. shapes: of its tensors, by our names, which know a DX policy's N."""
    kind = found.get("_class_name")
    text = metadata.get(POLICY, '{"type": "GMFlow"}' if kind == GM_CLASS else "")
    where = f"{POLICY} in the metadata of {path.parent}"
    try:
        arguments = json.loads(text)
        name = arguments.pop("type")
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} is {text!r} instead of JSON of the policy's arguments and its type.") from error
    require(name in ("GMFlow", "DX"), f"{where} names a policy of type {name!r}. Known are GMFlow and DX.")
    require(
        (name == "GMFlow") == (kind == GM_CLASS),
        f"{where} names a policy of type {name}, {path} a {kind}: one of them is of another student.",
    )
    for option, usual in IGNORED.items():
        value = arguments.pop(option, usual)
        require(usual is None or value == usual, f"{where}: {option}={value} is not supported, only {usual}.")
    return (
        read_gm(path, found, arguments, where) if name == "GMFlow" else read_dx(path, found, arguments, where, shapes)
    )


def read_gm(path: Path, found: dict[str, Any], arguments: dict[str, Any], where: str) -> PublishedPolicy:
    require(not arguments, f"{where} has arguments that are not known: {', '.join(sorted(arguments))}.")
    fixed = {
        "constant_logstd": (None, "the standard deviation is predicted here"),
        "gm_num_logstd_layers": (LOGSTD_LAYERS, "the head has two layers for it here"),
        "logweights_channels": (PATCHES, "every latent pixel has log-weights of its own here"),
    }
    for option, (value, reason) in fixed.items():
        # As LakonLab's class where the file is silent: one log-weight a token.
        given = found.get(option, 1 if option == "logweights_channels" else value)
        require(given == value, f"{path}: {option}={given} is not supported, only {value}: {reason}.")
    packed = found["in_channels"]
    out = found.get("out_channels") or packed
    require(
        out == packed, f"{path}: out_channels={out} differs from in_channels={packed}: another codec or patch size."
    )
    return PublishedPolicy(
        PolicyConfig(
            type="gmflow",
            num_components=found.get("num_gaussians", 16),
            logstd_inner_dim=found.get("logstd_inner_dim", 1024),
        )
    )


def read_dx(
    path: Path, found: dict[str, Any], arguments: dict[str, Any], where: str, shapes: dict[str, tuple[int, ...]]
) -> PublishedPolicy:
    mode = arguments.pop("mode", "grid")
    segment_size, shift = arguments.pop("segment_size", SEGMENT_SIZE), arguments.pop("shift", SHIFT)
    require(not arguments, f"{where} has arguments that are not known: {', '.join(sorted(arguments))}.")
    packed, rows = found["in_channels"], shapes.get("head.proj_out.weight", (0,))[0]
    require(
        rows >= 2 * packed and rows % packed == 0,
        f"{path.parent}: proj_out has {rows} outputs, which is not N >= 2 times the {packed} channels of a token.",
    )
    out = found.get("out_channels", rows)
    require(
        out in (rows, packed), f"{path}: out_channels={out}, but proj_out has {rows} outputs for tokens of {packed}."
    )
    policy = PolicyConfig(type="dx", mode=mode, num_nodes=rows // packed)
    return PublishedPolicy(policy, segment_size if mode == "grid" else None, shift)
