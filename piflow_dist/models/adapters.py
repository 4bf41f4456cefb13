"""Students in the published layout: adapters over a base, ours or third parties', and merged transformers.

Opened and checked here, by names and shapes and against their own config.json; read piece by piece like every other source of weights.
"""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piflow_dist.config import (
    ARCHITECTURES,
    Config,
    ConfigError,
    DataConfig,
    DistillConfig,
    LoraConfig,
    ModelConfig,
    PolicyConfig,
    ScheduleConfig,
    config_from,
    require,
)
from piflow_dist.models.architecture import architecture, named, plan_model, shape_tied
from piflow_dist.models.pretrained import DiffusersWeights, diffusers_folder, read_diffusers_config
from piflow_dist.models.published import is_student, read_json_file, read_policy, read_student_model
from piflow_dist.models.weights import WeightSource, misfits

RECIPE = "piflow_dist.json"
"""What our exports add and published loaders ignore: the schedule, steps and guidance of the training, and which base it had."""


@dataclass(frozen=True)
class ExportedStudent:
    """A folder in the published layout. lora: of an adapter, None of a merged student."""

    folder: Path
    weights: DiffusersWeights
    model: ModelConfig
    policy: PolicyConfig
    lora: LoraConfig | None
    schedule: ScheduleConfig
    distill: DistillConfig
    base: str | None
    """weights_likeness of the base it was trained on, where the folder says it."""
    trained_on: dict[str, Any]
    """Codec and prompt encoder of its data, where the folder says it."""


def open_student(folder: Path) -> ExportedStudent:
    """Open and check a student's folder. Raises ConfigError naming what is missing, unknown, misshapen or not supported."""
    try:
        return read_student(folder)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"config.json, policy_config or {RECIPE} of {folder} holds a value of a wrong type: {error}."
        ) from error


def read_student(folder: Path) -> ExportedStudent:
    path = folder / "config.json"
    found = read_json_file(path)
    kind, known = found.get("_class_name"), [name for one in map(named, ARCHITECTURES) for name in one.classes[1:]]
    require(
        is_student(found),
        f"{path} describes a {kind}, which is no pi-Flow student. Known are {', '.join(known)}.",
    )
    model = read_student_model(path, found)
    weights = DiffusersWeights(folder, model)
    published = read_policy(path, found, weights.metadata, weights.shapes())
    recipe = read_json_file(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    schedule, distill = read_recipe(folder / RECIPE, recipe, model)
    if published.shift is not None:
        schedule, distill = fit_to_dx(folder, schedule, distill, published.segment_size, published.shift)
    whole = f"{architecture(model).image_layer}.weight" in weights.shapes()
    lora = None if whole else read_lora(folder, model, weights.shapes())
    student = ExportedStudent(
        folder,
        weights,
        model,
        published.policy,
        lora,
        schedule,
        distill,
        recipe.get("base"),
        recipe.get("trained_on") or {},
    )
    check_student(student)
    return student


def student_folder(source: str) -> Path | None:
    """The folder where `source` is a student in the published layout, or holds one as transformer/; else None."""
    folder = diffusers_folder(source)
    return folder if folder is not None and is_student(read_json_file(folder / "config.json")) else None


def read_recipe(path: Path, recipe: dict[str, Any], model: ModelConfig) -> tuple[ScheduleConfig, DistillConfig]:
    """How a student was trained and is sampled; where the folder does not say it, as published."""
    published = architecture(model).published
    schedule = {"shift": published.shift, **recipe.get("schedule", {})}
    usual = {
        "nfe": published.nfe,
        "final_step_size_scale": published.final_step_size_scale,
        "window_substeps": 0,  # a window is for training
        "guidance": {"scale": published.guidance},
    }
    distill = {**usual, **recipe.get("distill", {})}
    try:
        return config_from(schedule, ScheduleConfig), config_from(distill, DistillConfig)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as a student's recipe: {error}") from error


def fit_to_dx(
    folder: Path, schedule: ScheduleConfig, distill: DistillConfig, segment_size: float | None, shift: float
) -> tuple[ScheduleConfig, DistillConfig]:
    """A DX policy fixes the shift and, on a grid, the number of steps that it is sampled with."""
    schedule = dataclasses.replace(schedule, shift=shift)
    if segment_size is None:
        return schedule, distill
    nfe = 1 / segment_size + 1 - distill.final_step_size_scale
    require(
        abs(nfe - round(nfe)) < 1e-4 and round(nfe) >= 1,
        f"{folder}: policy_config has segment_size={segment_size:g}, which is not 1/(nfe - 1 + {distill.final_step_size_scale:g}) "
        "for a whole number nfe of steps.",
    )
    return schedule, dataclasses.replace(distill, nfe=round(nfe))


ADAPTED = re.compile(r"(.+)\.lora_[AB]\.weight")


def read_lora(folder: Path, model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> LoraConfig:
    """Rank and layers of an adapter, from its tensors. Published adapters have alpha = rank."""
    layers = sorted({match[1] for name in shapes if (match := ADAPTED.fullmatch(name))})
    require(
        bool(layers),
        f"{folder} holds neither a transformer (no {architecture(model).image_layer}.weight) nor an adapter (no lora_A, lora_B).",
    )
    ranks: dict[int, str] = {}
    for layer in layers:
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            shape = shapes.get(f"{layer}.{part}.weight", ())
            if len(shape) == 2:
                ranks.setdefault(shape[dim], f"{layer}.{part}")
    require(
        len(ranks) == 1,
        f"{folder} has adapters of ranks {' and '.join(f'{rank} ({layer})' for rank, layer in sorted(ranks.items()))}. "
        "Only one rank for all layers is supported.",
    )
    (rank,) = ranks
    return LoraConfig(
        rank=rank, alpha=float(rank), dropout=0.0, targets=["|".join(re.escape(layer) for layer in layers)]
    )


def check_student(student: ExportedStudent) -> None:
    found = student.weights.shapes()
    if student.lora is None:
        model = plan_model(student.model, student.policy)
        wanted, optional = {name: tuple(p.shape) for name, p in model.named_parameters()}, model.unread
    else:
        try:
            model = shape_tied(student.model, student.policy, student.lora)
        except ConfigError as error:
            raise ConfigError(f"{student.folder}: {error}") from error
        wanted, optional = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}, ()
    problems = misfits(wanted, found, optional)
    require(not problems, f"{student.folder} does not hold the tensors that its config.json describes: {problems}.")


def student_config(student: ExportedStudent, base: str | None, dataset: str) -> Config:
    """The configuration of a run that would have this student. Raises ConfigError where the base is missing or another one."""
    if student.lora is not None:
        require(
            base is not None,
            f"{student.folder} is an adapter. Give base=PATH, the transformer that it was trained on (in diffusers' layout, "
            "or a teacher's run folder).",
        )
    return Config(
        run_dir=str(student.folder),
        mode="full" if student.lora is None else "tied",
        model=student.model,
        policy=student.policy,
        schedule=student.schedule,
        lora=student.lora or LoraConfig(),
        # A merged student needs no teacher any more.
        distill=dataclasses.replace(student.distill, teacher=base or str(student.folder)),
        data=DataConfig(root=dataset),
    )


def teacher_config(folder: Path, dataset: str) -> Config:
    """The configuration of a run that would have this teacher, which is in diffusers' layout."""
    recipe = read_json_file(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    model = read_diffusers_config(folder)
    config = Config(
        run_dir=str(folder),
        objective="flow_matching",
        model=dataclasses.replace(model, guidance_embeds=False),
        schedule=read_recipe(folder / RECIPE, recipe, model)[0],
        data=DataConfig(root=dataset),
    )
    config.model = model  # flow matching could not train a guidance-distilled one, but it can be sampled
    return config


def weights_likeness(source: WeightSource, model: ModelConfig) -> str:
    """A digest by which two copies of a transformer are known as the same, whatever their files and dtype.

    Of the vectors and the first row of every matrix, rounded to bfloat16: hashing 40 GB would take minutes.
    """
    digest, unread = hashlib.sha256(), architecture(model).unread_of(model)
    for name, shape in sorted(source.shapes().items()):
        if name not in unread:
            sample = source.view(name)[:] if len(shape) == 1 else source.view(name)[:1]
            digest.update(name.encode())
            digest.update(sample.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_base(student: ExportedStudent, base: WeightSource, option: str) -> None:
    """Raise ConfigError where the adapter says that it was trained on another base."""
    if student.lora is None or student.base is None:
        return
    found = weights_likeness(base, student.model)
    require(
        found == student.base,
        f"{option} ({base.origin}, likeness {found[:12]}) is not the transformer that {student.folder} was trained on "
        f"({student.base[:12]}). Give that one.",
    )
