"""Weights on disk: our checkpoints and diffusers' folders, and the models that they belong to."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from piflow_dist.checkpoint.files import STATE, read_json
from piflow_dist.checkpoint.reader import CheckpointWeights
from piflow_dist.checkpoint.runs import resolve_checkpoint
from piflow_dist.config import Config, ConfigError, ModelConfig, require
from piflow_dist.models.architecture import architecture, plan_model, plan_student, plan_tied
from piflow_dist.models.lora import MergedWeights
from piflow_dist.models.published import read_json_file, read_model, read_teacher_model
from piflow_dist.models.transformer import Transformer
from piflow_dist.models.weights import OverlaidWeights, View, WeightSource, check_trained, fill, shape_of

CONFIG = "config.json"
INDEX, SINGLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"
FLOATS = ("BF16", "F16", "F32", "F64")
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16


class DiffusersWeights:
    """A transformer in diffusers' layout: one safetensors file, or several with an index. Read where it is indexed.

    model: whose names the tensors get; default: what config.json describes.
    """

    def __init__(self, folder: Path, model: ModelConfig | None = None):
        self.origin = str(folder)
        found = read_json_file(folder / CONFIG) if model is None or (folder / CONFIG).is_file() else {}
        model = model or read_model(folder / CONFIG, found)
        try:
            if (folder / INDEX).is_file():
                files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            else:
                files = [SINGLE]
            opened = [safe_open(folder / name, framework="pt") for name in files]
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder} cannot be read as a transformer in diffusers' layout: {error}") from error
        require(bool(files), f"{folder / INDEX} lists no files.")
        self.files = [folder / name for name in files]
        self.metadata: dict[str, str] = opened[0].metadata() or {}
        views = {plain_name(key): file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118 (no dict)
        for name, view in views.items():
            require(
                view.get_dtype() in FLOATS,
                f"{folder}: {name} is stored as {view.get_dtype()}, which is no weight or a quantised one. Give weights in "
                f"{', '.join(FLOATS)}.",
            )
        self.views = architecture(model).from_published(views, model, found)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape_of(view) for name, view in self.views.items()}

    def view(self, name: str) -> View:
        return self.views[name]

    def fingerprint(self) -> str:
        """Of names, shapes and sampled contents: whole files of 40 GB would take minutes to hash."""
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name},{size}".encode())
            with open(path, "rb") as file:
                for block in range(SAMPLED_BLOCKS):
                    file.seek(block * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()


def plain_name(name: str) -> str:
    """Adapters may have been written with peft's prefixes."""
    return name.removeprefix("transformer.").replace(".default.weight", ".weight")


def read_diffusers_config(folder: Path) -> ModelConfig:
    """The shape of a teacher. Raises ConfigError for variants of the architectures that we have not."""
    return read_teacher_model(folder / CONFIG, read_json_file(folder / CONFIG))


def diffusers_folder(source: str) -> Path | None:
    """The transformer's folder where `source` is one, or a whole pipeline; None where it is neither."""
    for folder in (Path(source), Path(source) / "transformer"):
        if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
            return folder
    return None


def open_teacher(config: Config) -> DiffusersWeights | CheckpointWeights:
    """The weights of a distillation's teacher (averaged ones, of a run of ours). Raises ConfigError and CheckpointError."""
    folder = diffusers_folder(config.distill.teacher)
    if folder is not None:
        return DiffusersWeights(folder, config.model)
    return CheckpointWeights(resolve_checkpoint(config.distill.teacher, "distill.teacher"), ema=True)


def plan_training(config: Config, initial: WeightSource | None = None) -> tuple[Transformer, WeightSource]:
    """The model that a distillation trains, on the meta device, and the weights it starts from: the teacher's, or `initial` over them."""
    teacher, seed = open_teacher(config), config.train.seed
    if config.mode == "tied":
        model, start = plan_tied(config.model, config.policy, config.lora, teacher, seed)
    else:
        model, start = plan_student(config.model, config.policy, teacher, seed)
    if initial is not None:
        check_trained(model, initial)
        start = OverlaidWeights(initial, start)
    return model, start


def open_weights(place: Path, model: ModelConfig, ema: bool = True) -> DiffusersWeights | CheckpointWeights:
    """Of a checkpoint's folder or a folder in diffusers' layout (which has one kind of weights)."""
    return CheckpointWeights(place, ema) if diffusers_folder(str(place)) is None else DiffusersWeights(place, model)


def open_model(
    checkpoint: Path, config: Config, ema: bool = True, merged_on: torch.device | None = None
) -> tuple[Transformer, WeightSource]:
    """The model of a run's checkpoint, or of a folder in diffusers' layout, on the meta device, and its weights: a teacher's or a
    student's, as config says.

    merged_on: where a tied student's adapters are merged into the weights; None: they stay beside them. Raises CheckpointError for damaged files, ConfigError where a tied student's base is another than it was trained on.
    """
    trained = open_weights(checkpoint, config.model, ema)
    if config.mode != "tied":
        return plan_model(config.model, config.policy if config.distils else None), trained
    check_trained_on(checkpoint, config)
    if merged_on is not None:
        scale = config.lora.alpha / config.lora.rank
        return plan_model(config.model, config.policy), MergedWeights(trained, open_teacher(config), scale, merged_on)
    model, start = plan_tied(config.model, config.policy, config.lora, open_teacher(config), config.train.seed)
    return model, OverlaidWeights(trained, start)


def load_model(checkpoint: Path, config: Config, ema: bool = True) -> Transformer:
    """open_model on the CPU in fp32. Raises ValueError too, where the weights are not those of the configured model."""
    model, weights = open_model(checkpoint, config, ema)
    fill(model, weights)
    return model


def check_trained_on(checkpoint: Path, config: Config) -> None:
    """A checkpoint's adapters mean something on the weights they were trained on alone. Raises ConfigError for others.

    (An exported adapter knows the values of its base, not its files: adapters.py.)
    """
    if not (checkpoint / STATE).is_file():
        return
    found, wanted = open_teacher(config).fingerprint(), read_json(checkpoint / STATE)["teacher"]
    require(
        found == wanted,
        f"distill.teacher={config.distill.teacher} (fingerprint {found[:12]}) is not the base that the adapters of {checkpoint} "
        f"were trained on ({str(wanted)[:12]}). Put that one back in its place.",
    )
