"""Export a run's student as an adapter or a merged transformer in the published layout; a teacher as diffusers' transformer.

Read and written tensor by tensor. The folder appears under its name when it is whole.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from piflow_dist.checkpoint.files import STATE, CheckpointError, read_json
from piflow_dist.checkpoint.reader import CheckpointWeights
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.checkpoint.streaming import Spec, TensorFile, byte_size, new_folder
from piflow_dist.config import Config, ConfigError, config_values, require, require_choice
from piflow_dist.models.adapters import RECIPE, weights_likeness
from piflow_dist.models.architecture import architecture, plan_model
from piflow_dist.models.lora import MergedWeights
from piflow_dist.models.pretrained import INDEX, SINGLE, open_teacher
from piflow_dist.models.published import POLICY, model_json, policy_json
from piflow_dist.models.weights import WeightSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(kw_only=True)
class ExportConfig:
    source: str = MISSING
    """Run folder (its newest complete checkpoint) or checkpoint folder."""
    out: str = MISSING
    """Folder to write; must not exist."""
    format: str = "adapter"
    """adapter (of a tied student) or merged (a whole transformer, of any run)."""
    ema: bool = True
    """Averaged weights, or the raw ones."""
    dtype: str | None = None
    """fp32, bf16 or fp16; default: fp32 for an adapter, bf16 for a merged transformer."""
    max_shard_size: str = "5GB"
    """Largest file of a merged transformer; units KB, MB, GB."""
    base: str | None = None
    """The teacher under a tied student, where it has moved since the training."""

    def __post_init__(self):
        require_choice("format", self.format, ("adapter", "merged"))
        if self.dtype is not None:
            require_choice("dtype", self.dtype, tuple(DTYPES))
        parse_size(self.max_shard_size)


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.upper())
    require(match is not None and float(match[1]) > 0, f"max_shard_size={text} is not a size like 5GB or 200MB.")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its published name, its shape, and how to get it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Exported:
    out: Path
    checkpoint: Path
    step: int
    tensors: int
    bytes: int
    base_known: bool
    """False for an adapter whose base could not be opened: its folder does not say which it was."""


def export(options: ExportConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> Exported:
    """Raises ConfigError for what cannot be exported, CheckpointError for damaged files and full disks."""
    out = Path(options.out)
    require(not out.exists(), f"out={out} exists. Choose another folder; nothing is overwritten.")
    checkpoint = resolve_checkpoint(options.source, "source")
    run, state = read_run_config(checkpoint), read_json(checkpoint / STATE)
    require(
        not run.distils or run.policy.type != "mean",
        f"source={options.source} was trained with objective={run.objective}: no pipeline reads a network of mean velocities "
        "(policy.type=mean), so there is no layout to write. tools/sample.py samples from the run itself.",
    )
    if options.base is not None:
        run.distill.teacher = options.base
    trained = CheckpointWeights(checkpoint, options.ema)
    metadata = {"format": "pt"}
    if run.distils:
        metadata[POLICY] = policy_json(run)
    dtype = DTYPES[options.dtype or ("fp32" if options.format == "adapter" else "bf16")]
    base = open_base(run, state, options.format) if run.mode == "tied" else None
    if options.format == "adapter":
        entries, limit = adapter_entries(run, trained), None
    else:
        entries, limit = merged_entries(run, trained, base), parse_size(options.max_shard_size)
    with new_folder(out) as folder:
        total = write_files(folder, entries, dtype, metadata, limit, progress)
        write_json(folder / "config.json", model_json(run.model, run.policy if run.distils else None))
        write_json(folder / RECIPE, recipe(run, state, trained, options, base))
    return Exported(out, checkpoint, state["step"], len(entries), total, base is not None or options.format == "merged")


def open_base(run: Config, state: dict, kind: str) -> WeightSource | None:
    """The frozen weights of a tied student, the ones it was trained on. An adapter can do without them."""
    try:
        base = open_teacher(run)
    except ConfigError as error:
        if kind == "adapter":
            return None
        raise ConfigError(
            f"The base of this student is needed for format=merged: {error} Where is it now? base=PATH."
        ) from error
    require(
        base.fingerprint() == state["teacher"],
        f"{run.distill.teacher} (fingerprint {base.fingerprint()[:12]}) is not the teacher that this student was trained on "
        f"({str(state['teacher'])[:12]}). Give base=PATH of that one.",
    )
    return base


def adapter_entries(run: Config, trained: CheckpointWeights) -> list[Entry]:
    require(
        run.mode == "tied",
        f"format=adapter: this run has mode={run.mode}, all its weights are trained and there is no adapter. Use format=merged.",
    )
    scale = run.lora.alpha / run.lora.rank

    def reader(name: str) -> Callable[[], Tensor]:
        # Published adapters are read with alpha = rank, so that B carries the factor of another alpha.
        return lambda: trained.view(name) * scale if name.endswith(".lora_B.weight") else trained.view(name)

    return [published(run, name, shape, reader(name)) for name, shape in trained.shapes().items()]


def published(run: Config, name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Entry:
    """A tensor of ours as its architecture's published layout has it."""
    kind = architecture(run.model)
    written = tuple(kind.to_published(name, torch.empty(shape, device="meta"), run.model).shape)
    return Entry(kind.published_name(name), written, lambda: kind.to_published(name, read(), run.model))


def merged_entries(run: Config, trained: CheckpointWeights, base: WeightSource | None) -> list[Entry]:
    """All weights of the whole transformer; of layers with adapters W + alpha/rank B A, in fp32."""
    scale = run.lora.alpha / run.lora.rank
    source: WeightSource = trained if base is None else MergedWeights(trained, base, scale)
    found, model = source.shapes(), plan_model(run.model, run.policy if run.distils else None)

    def reader(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        if name in found:
            return lambda: source.view(name)[:]
        return lambda: torch.zeros(shape)  # the last block's text branch, which nothing reads and nobody trained

    lost = [name for name, _ in model.named_parameters() if name not in found and name not in model.unread]
    if lost:
        raise CheckpointError(f"{source.origin} has no {', '.join(lost[:8])}.")
    return [published(run, name, tuple(p.shape), reader(name, tuple(p.shape))) for name, p in model.named_parameters()]


def write_files(
    folder: Path,
    entries: list[Entry],
    dtype: torch.dtype,
    metadata: dict[str, str],
    limit: int | None,
    progress: Callable[[int, int], None],
) -> int:
    """One file, or as many as `limit` bytes a file ask for, with their index; how many bytes of tensors."""
    files: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in entries:
        size = byte_size((dtype, entry.shape))
        if limit is not None and files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled, total = filled + size, total + size
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    done = 0
    for name, members in zip([SINGLE] if len(files) == 1 else names, files, strict=True):
        specs: dict[str, Spec] = {entry.name: (dtype, entry.shape) for entry in members}
        with TensorFile(folder / name, specs, metadata) as file:
            for entry in members:
                file.write(entry.name, entry.read())
                done += 1
                progress(done, len(entries))
    if len(files) > 1:
        weight_map = {entry.name: name for name, members in zip(names, files, strict=True) for entry in members}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def recipe(
    run: Config, state: dict, trained: CheckpointWeights, options: ExportConfig, base: WeightSource | None
) -> dict:
    """What published loaders do not need: how the student is sampled and what it comes from. No paths of this machine."""
    values = config_values(run)
    content = {
        "step": state["step"],
        "weights": "ema" if options.ema else "raw",
        "checkpoint": trained.fingerprint(),
        "objective": run.objective,
        "schedule": values["schedule"],
        "trained_on": state.get("trained_on"),
    }
    if not run.distils:
        return content
    content |= {"mode": run.mode, "distill": {**values["distill"], "teacher": None}, "teacher": state["teacher"]}
    if run.mode == "tied":
        content["lora"] = values["lora"]
    if base is not None:
        content["base"] = weights_likeness(base, run.model)
    return content


def write_json(path: Path, content: dict) -> None:
    with open(path, "w") as file:
        file.write(json.dumps(content, indent=2, sort_keys=path.name != RECIPE) + "\n")
        file.flush()
        os.fsync(file.fileno())
