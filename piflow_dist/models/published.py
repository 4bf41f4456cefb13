"""The layouts in which teachers and pi-Flow students are published: config.json and policy_config.

Names of tensors, and what differs between architectures, are with the architectures (transformer.py). Students are
Read by LakonLab's pi-Flow pipelines and by ComfyUI-piFlow; docs/export.md says what each of them takes from it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_dist.config import ARCHITECTURES, Config, ConfigError, ModelConfig, PolicyConfig, require
from piflow_dist.models.architecture import architecture, named
from piflow_dist.models.heads import PATCH
from piflow_dist.models.transformer import Transformer

POLICY = "policy_config"
LOGSTD_LAYERS = 2
LOGWEIGHTS = PATCH**2
"""Of a token, per component: every latent pixel has its own."""
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
    kind = architecture(model)
    teacher_class, gm_class, dx_class = kind.classes
    shape = kind.shape_json(model)
    if policy is None:
        return {"_class_name": teacher_class, **shape, **kind.teacher_json(model)}
    out = shape["in_channels"]
    if policy.type == "dx":
        # The class that carries it is diffusers' own, told to predict N times the channels of packed tokens.
        unpatched = {"patch_size": 1} if kind.packed else {}
        return {"_class_name": dx_class, **shape, **unpatched, "out_channels": policy.num_nodes * out}
    return {
        "_class_name": gm_class,
        **shape,
        "out_channels": out,
        "num_gaussians": policy.num_components,
        "constant_logstd": None,
        "logstd_inner_dim": policy.logstd_inner_dim,
        "gm_num_logstd_layers": LOGSTD_LAYERS,
        **({"logweights_channels": LOGWEIGHTS} if kind.packed else {}),
    }


def architecture_of(found: dict[str, Any]) -> type[Transformer] | None:
    """Whose teacher or student a config.json describes."""
    kinds = [named(name) for name in ARCHITECTURES]
    wanted = found.get("_class_name")
    return next((kind for kind in kinds if wanted in (*kind.classes, *kind.other_classes)), None)


def is_student(found: dict[str, Any]) -> bool:
    """DX students are published as the teacher's class too, with more outputs."""
    kind = architecture_of(found)
    if kind is None:
        return False
    name, (teacher_class, *student_classes) = found["_class_name"], kind.classes
    return name in student_classes or (name == teacher_class and kind.predicts_more(found))


def read_model(path: Path, found: dict[str, Any]) -> ModelConfig:
    """The shape of a teacher or of a student, from its config.json."""
    return (read_student_model if is_student(found) else read_teacher_model)(path, found)


def read_teacher_model(path: Path, found: dict[str, Any]) -> ModelConfig:
    kind = architecture_of(found)
    known = [name for one in map(named, ARCHITECTURES) for name in (one.classes[0], *one.other_classes)]
    if kind is None or found["_class_name"] not in known:
        raise ConfigError(
            f"{path} describes a {found.get('_class_name')}; a teacher here is one of: {', '.join(known)}."
        )
    missing = [key for key in kind.teacher_keys if key not in found]
    require(not missing, f"{path} does not say {', '.join(missing)}. Give a config.json as diffusers writes it.")
    kind.check_teacher(str(path), found)
    return kind.read_shape(found)


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
    kind = architecture_of(found)
    try:
        if kind.packed:
            packed = found["in_channels"]
            require(packed % PATCH**2 == 0, f"in_channels={packed} are not 2 x 2 patches of a latent.")
        return kind.read_shape(found)
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}.") from error
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path} does not describe a transformer: {error}") from error


def read_policy(
    path: Path, found: dict[str, Any], metadata: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> PublishedPolicy:
    """The policy of a student's folder. shapes: of its tensors, by our names, which know a DX policy's N."""
    kind, gm_class = found.get("_class_name"), architecture_of(found).classes[1]
    text = metadata.get(POLICY, '{"type": "GMFlow"}' if kind == gm_class else "")
    where = f"{POLICY} in the metadata of {path.parent}"
    try:
        arguments = json.loads(text)
        name = arguments.pop("type")
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} is {text!r} instead of JSON of the policy's arguments and its type.") from error
    require(name in ("GMFlow", "DX"), f"{where} names a policy of type {name!r}. Known are GMFlow and DX.")
    require(
        (name == "GMFlow") == (kind == gm_class),
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
    }
    if architecture_of(found).packed:
        fixed["logweights_channels"] = (LOGWEIGHTS, "every latent pixel has log-weights of its own here")
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
    kind, rows = architecture_of(found), shapes.get("head.proj_out.weight", (0,))[0]
    channels = found["in_channels"]
    packed = channels if kind.packed else channels * PATCH**2
    require(
        rows >= 2 * packed and rows % packed == 0,
        f"{path.parent}: proj_out has {rows} outputs, which is not N >= 2 times the {packed} channels of a token.",
    )
    out = found.get("out_channels", rows) * (1 if kind.packed else PATCH**2)
    require(
        out in (rows, packed), f"{path}: out_channels={out}, but proj_out has {rows} outputs for tokens of {packed}."
    )
    policy = PolicyConfig(type="dx", mode=mode, num_nodes=rows // packed)
    return PublishedPolicy(policy, segment_size if mode == "grid" else None, shift)
