"""init_from=: the weights of an earlier student, from which another training starts with a fresh optimizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import STATE, read_json
from piflow_dist.checkpoint.reader import CheckpointWeights
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import Config, LoraConfig, ModelConfig, PolicyConfig, changed_keys, require
from piflow_dist.models.adapters import ExportedStudent, check_base, open_student, student_folder
from piflow_dist.models.pretrained import diffusers_folder, open_teacher
from piflow_dist.models.weights import ScaledWeights, WeightSource

FACTS = {
    "gmflow": ("type", "num_components", "logstd_inner_dim"),
    "dx": ("type", "num_nodes", "mode"),
    "mean": ("type",),
}


@dataclass(frozen=True)
class InitialWeights:
    """Trained weights by our names, and what is written down about where they come from."""

    weights: WeightSource
    lineage: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What is known of the student to start from. lora: of adapters, None where whole weights were trained."""

    what: str
    weights: WeightSource
    model: ModelConfig
    policy: PolicyConfig
    lora: LoraConfig | None
    shift: float
    segment_size: float
    lineage: dict[str, Any]


def open_initial(config: Config) -> InitialWeights:
    """The weights of config.init_from. Raises ConfigError naming what does not fit this run."""
    folder = student_folder(config.init_from)
    origin = run_origin(config) if folder is None else export_origin(config, open_student(folder))
    check_same(config, origin)
    weights = origin.weights
    if origin.lora is not None:
        theirs, ours = origin.lora.alpha / origin.lora.rank, config.lora.alpha / config.lora.rank
        if theirs != ours:
            weights = ScaledWeights(weights, ".lora_B.weight", theirs / ours)
    return InitialWeights(weights, origin.lineage)


def export_origin(config: Config, student: ExportedStudent) -> Origin:
    if student.lora is not None and config.mode == "tied":
        check_base(student, open_teacher(config), f"distill.teacher={config.distill.teacher}")
    lineage = {"source": config.init_from, "fingerprint": student.weights.fingerprint()}
    return Origin(
        "an adapter" if student.lora else "a merged transformer",
        student.weights,
        student.model,
        student.policy,
        student.lora,
        student.schedule.shift,
        student.distill.base_segment,
        lineage,
    )


def run_origin(config: Config) -> Origin:
    require(
        diffusers_folder(config.init_from) is None,
        f"init_from={config.init_from} is a teacher in diffusers' layout. A student starts from its teacher anyway: set "
        "distill.teacher, and init_from=null.",
    )
    checkpoint = resolve_checkpoint(config.init_from, "init_from")
    theirs, state = read_run_config(checkpoint), read_json(checkpoint / STATE)
    require(
        theirs.distils,
        f"init_from={config.init_from} was trained with objective={theirs.objective}. A student starts from its teacher anyway: set "
        "distill.teacher, and init_from=null.",
    )
    require_not_itself(config, checkpoint)
    if theirs.mode == config.mode == "tied":
        teacher = open_teacher(config).fingerprint()
        require(
            teacher == state["teacher"],
            f"distill.teacher={config.distill.teacher} (fingerprint {teacher[:12]}) is not the teacher whose adapters "
            f"init_from={config.init_from} holds ({str(state['teacher'])[:12]}). Give that one.",
        )
    weights = CheckpointWeights(checkpoint, config.init_ema)
    lineage = {
        "source": str(checkpoint),
        "step": state["step"],
        "weights": "ema" if config.init_ema else "raw",
        "fingerprint": weights.fingerprint(),
    }
    what = f"a checkpoint of mode={theirs.mode}"
    lora = theirs.lora if theirs.mode == "tied" else None
    shift, segment = theirs.schedule.shift, theirs.distill.base_segment
    return Origin(what, weights, theirs.model, theirs.policy, lora, shift, segment, lineage)


def require_not_itself(config: Config, checkpoint: Path) -> None:
    require(
        Path(config.run_dir).resolve() not in checkpoint.resolve().parents[:2],
        f"init_from={config.init_from} is run_dir={config.run_dir} itself, which is continued anyway. Choose another run_dir.",
    )


def check_same(config: Config, origin: Origin) -> None:
    source = f"init_from={config.init_from}"
    require(
        (origin.lora is not None) == (config.mode == "tied"),
        f"{source} is {origin.what}, this run has mode={config.mode}. "
        + (
            "Set mode=tied, or export it with format=merged first."
            if origin.lora is not None
            else "Set mode=full: whole weights have no adapters in them."
        ),
    )
    different = {f"model.{key}": values for key, values in changed_keys(config.model, origin.model).items()}
    same_kind = config.policy.type == origin.policy.type
    for key in FACTS[config.policy.type] if same_kind else ("type",):
        ours, theirs = getattr(config.policy, key), getattr(origin.policy, key)
        if ours != theirs:
            different[f"policy.{key}"] = (ours, theirs)
    if origin.lora is not None and origin.lora.rank != config.lora.rank:
        different["lora.rank"] = (config.lora.rank, origin.lora.rank)
    if same_kind and config.policy.type == "dx":
        # A DX policy's outputs stand for points in time, which these place.
        if origin.shift != config.schedule.shift:
            different["schedule.shift"] = (config.schedule.shift, origin.shift)
        if config.policy.mode == "grid" and abs(origin.segment_size - config.distill.base_segment) > 1e-6:
            different["1/(distill.nfe - 1 + distill.final_step_size_scale)"] = (
                f"{config.distill.base_segment:g}",
                f"{origin.segment_size:g}",
            )
    listed = "; ".join(f"{key} is {theirs} there and {ours} here" for key, (ours, theirs) in different.items())
    require(not different, f"{source} is another student: {listed}.")
