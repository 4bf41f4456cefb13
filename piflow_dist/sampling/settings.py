"""Settings of tools/sample.py, and what they mean for a given source."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from data_pipeline.codec import downscale_of
from data_pipeline.description import DatasetDescription, load_description
from piflow_dist.checkpoint.files import MANIFEST
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import (
    Config,
    ConfigError,
    LaunchConfig,
    require,
    require_choice,
    require_interval,
    require_positive,
)
from piflow_dist.distill.objectives import build_schedule
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.models.adapters import (
    check_base,
    open_student,
    student_config,
    student_folder,
    teacher_config,
    weights_likeness,
)
from piflow_dist.models.heads import PATCH
from piflow_dist.models.pretrained import DiffusersWeights, check_trained_on, diffusers_folder, open_teacher
from piflow_dist.sampling.images import ImageRequest, list_images, read_prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVERYWHERE = (0.0, 1.0)


@dataclass(kw_only=True)
class SplitConfig:
    """How the model is shared out where it does not fit on one device."""

    tp: int = 1
    """Processes that share every layer (tensor parallelism), inside a node; the others sample other images."""
    shard_base: bool = False
    """Shard the weights over the other processes too (ZeRO-3): the least memory, but each layer is sent for every evaluation."""

    def __post_init__(self):
        require_positive("parallel", self, "tp")


@dataclass(kw_only=True)
class SampleConfig:
    """Images from a teacher's or student's run."""

    source: str = MISSING
    """Run folder, one of its checkpoint folders, or an exported adapter or transformer (docs/export.md)."""
    base: str | None = None
    """Of an adapter, or a tied student whose teacher has moved: the transformer under it."""
    dataset: str | None = None
    """Prepared data whose codec, prompt encoder and latent size are used; default: the run's own."""
    out: str = MISSING
    prompts: str | None = None
    """Text file, one prompt a line, or .jsonl with prompt, seed or seeds, height, width (all but the prompt left out at will);
    default: the distinct prompts of the training data."""
    seed: int = 0
    """First seed of every prompt. An image depends on its prompt, seed and size, whatever else is asked for."""
    images_per_prompt: int = 1
    """Seeds of every prompt: seed, seed + 1, and so on."""
    seeds: list[int] | None = None
    """The seeds of every prompt one by one, instead of seed and images_per_prompt."""
    size: int | None = None
    """Side of square images, in pixels; default: that of most images of the data."""
    height: int | None = None
    width: int | None = None
    """Of images that are not square."""
    nfe: int | None = None
    """Student evaluations per image; default: as trained."""
    steps: int = 100
    """Euler steps of a teacher."""
    guidance: float = 1.0
    """Guidance scale of a teacher."""
    guidance_interval: list[float] = field(default_factory=lambda: list(EVERYWHERE))
    """Noise levels sigma between which a teacher's guidance acts: a student's teacher had distill.guidance.interval."""
    temperature: str = "auto"
    """Of a GMFlow student, at every step but the last: a number, or auto = 0.1 (nfe - 1)."""
    h: str = "0"
    """Noise of a student's flow-map sampler: 0 is the ODE, inf draws all noise afresh."""
    substeps: int = 128
    """Policy substeps over the whole trajectory."""
    shift: float | None = None
    """Shift of the noise schedule; default: as trained, for each image's own size where that is dynamic."""
    ema: bool = True
    """Averaged weights, or the raw ones."""
    merge: bool = False
    """Merge a tied student's adapters into its weights as they are read: less arithmetic; in bf16 the weights are rounded once more."""
    dtype: str | None = None
    """fp32 or bf16; default: as trained, fp32 for exported folders."""
    batch_size: int = 64
    """Images of one size that are made at once, at most. On a CPU also limited by their tokens, for images that depend on nothing else."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start of every process and size, faster from then on."""
    latents: bool = True
    """Keep the latents too, for comparisons in latent space: latents/*.safetensors."""
    embeddings: str | None = None
    """Folder of prompt embeddings that are kept between runs; default: .embeddings beside out."""
    mlflow: bool = False
    """Log contact sheet and manifest to the MLflow run of the source's training, as a child run."""
    overwrite: bool = False
    """Replace images of other settings in the same folder."""
    parallel: SplitConfig = field(default_factory=SplitConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self):
        require_positive("sample", self, "images_per_prompt", "steps", "substeps", "batch_size")
        require(self.nfe is None or self.nfe > 0, f"nfe={self.nfe} must be greater than zero.")
        require(self.guidance >= 1, f"guidance={self.guidance} is below 1. Use 1 for none.")
        require_interval("guidance_interval", self.guidance_interval)
        require(
            self.guidance > 1 or tuple(self.guidance_interval) == EVERYWHERE,
            f"guidance_interval={list(self.guidance_interval)} with guidance={self.guidance}, which is none. Give guidance too.",
        )
        if self.temperature != "auto":
            require(
                0 < number("temperature", self.temperature) <= 1, f"temperature={self.temperature} must lie in (0, 1]."
            )
        require(number("h", self.h) >= 0, f"h={self.h} must be 0 (ODE) or more.")
        require(self.shift is None or 0 < self.shift < math.inf, f"shift={self.shift} must be greater than zero.")
        if self.dtype is not None:
            require_choice("dtype", self.dtype, tuple(DTYPES))
        require(
            self.seeds is None or (self.seed, self.images_per_prompt) == (0, 1),
            f"seeds={self.seeds} with seed={self.seed} and images_per_prompt={self.images_per_prompt}: give seeds alone, or the others.",
        )
        require(
            self.size is None or self.height is self.width is None,
            f"size={self.size} with height={self.height} and width={self.width}: give size alone, or height and width.",
        )
        require((self.height is None) == (self.width is None), "height and width belong together. Give both, or size.")
        require(
            not (self.compile and self.parallel.shard_base),
            "compile=true: torch.compile cannot follow parallel.shard_base=true, which moves weights between layers. Set one of them.",
        )
        require(
            self.launch.processes % self.parallel.tp == 0,
            f"launch.processes={self.launch.processes} are not whole tensor-parallel groups of parallel.tp={self.parallel.tp}. "
            "Choose a multiple of parallel.tp.",
        )

    @property
    def embeddings_folder(self) -> Path:
        return Path(self.embeddings) if self.embeddings is not None else Path(self.out).parent / ".embeddings"


ONLY_OF = {
    "teacher": ("steps", "guidance", "guidance_interval"),
    "student": ("nfe", "temperature", "h", "substeps", "merge"),
}
"""Keys that mean something for one kind of source."""


def number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"{option}={text} is not a number.") from error
    require(not math.isnan(value), f"{option}={text} is not a number.")
    return value


@dataclass(frozen=True)
class SampleRequest:
    """A checked request: which image is made from which prompt, noise, weights and settings."""

    config: SampleConfig
    run: Config
    checkpoint: Path
    dataset: DatasetDescription
    images: list[ImageRequest]

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def kind(self) -> str:
        return "student" if self.run.distils else "teacher"

    @property
    def evaluations(self) -> int:
        """Network evaluations per image."""
        if self.kind == "student":
            return self.config.nfe or self.run.distill.nfe
        unconditional = self.config.guidance > 1 and not self.run.model.guidance_embeds
        return self.config.steps * (2 if unconditional else 1)

    @property
    def temperature(self) -> float | str:
        if self.run.policy.type != "gmflow":
            return 1.0
        return "auto" if self.config.temperature == "auto" else float(self.config.temperature)

    @property
    def dtype(self) -> str:
        return self.config.dtype or self.run.train.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def latent_shape(self, image: ImageRequest) -> tuple[int, int, int]:
        edge = downscale_of(self.dataset.codec)
        return self.run.model.latent_channels, image.height // edge, image.width // edge

    def schedule(self, image: ImageRequest) -> FlowSchedule:
        """For the image's own size, where the shift depends on that."""
        if self.config.shift is not None:
            return FlowSchedule(shift=self.config.shift)
        return build_schedule(self.run.schedule, self.latent_shape(image))

    def missing(self) -> list[ImageRequest]:
        return [image for image in self.images if not image.is_whole(self.out, self.config.latents)]

    def settings(self) -> dict[str, Any]:
        """What the pixels depend on beside prompt, seed, size and weights."""
        config, common = (
            self.config,
            {"kind": self.kind, "dtype": self.dtype, "shift": self.config.shift, "ema": self.config.ema},
        )
        if self.kind == "teacher":
            guidance = {"guidance": config.guidance, "guidance_interval": list(config.guidance_interval)}
            return common | {"steps": config.steps, **guidance}
        sampler = {"temperature": self.temperature, "h": f"{float(config.h):g}", "substeps": config.substeps}
        return common | {"nfe": self.evaluations, **sampler, "merge": config.merge}

    def identity(self) -> dict[str, Any]:
        """Everything the images of the folder depend on, whole models by their hash."""
        exported = diffusers_folder(str(self.checkpoint)) is not None
        manifest = self.checkpoint / MANIFEST
        weights = (
            DiffusersWeights(self.checkpoint, self.run.model).fingerprint()
            if exported
            else hashlib.sha256(manifest.read_bytes()).hexdigest()
        )
        codec = self.dataset.codec
        moved = ("path",) if "weights" in codec else ()  # a VAE that says its weights may lie elsewhere
        wanted = "".join(f"{i.prompt}\n{i.seed} {i.height} {i.width}\n" for i in self.images)
        return {
            **self.settings(),
            "base": self.config.base,
            "dataset": self.config.dataset,
            "seeds": seeds_of(self.config),
            "images": len(self.images),
            "images_sha256": hashlib.sha256(wanted.encode()).hexdigest(),
            "weights_sha256": weights,
            "codec_sha256": digest({key: value for key, value in codec.items() if key not in moved}),
            "prompt_encoder_sha256": digest(self.dataset.prompt_encoder),
            "base_sha256": self.base_likeness(),
        }

    def base_likeness(self) -> str | None:
        """Of the transformer under an adapter that does not say its base's; others are compared with it as they are opened."""
        if student_folder(str(self.checkpoint)) is None:
            return None
        student = open_student(self.checkpoint)
        if student.lora is None or student.base is not None:
            return None
        return weights_likeness(open_teacher(self.run), student.model)


def digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(description), sort_keys=True).encode()).hexdigest()


def seeds_of(config: SampleConfig) -> list[int]:
    if config.seeds is not None:
        return list(config.seeds)
    return list(range(config.seed, config.seed + config.images_per_prompt))


def build_request(config: SampleConfig) -> SampleRequest:
    """Resolve source and prompts. Raises ConfigError for what cannot be sampled."""
    checkpoint, run = resolve_source(config)
    dataset = load_dataset(run)
    refuse_idle_keys(config, run)
    if config.nfe is not None and run.distils and run.objective != "meanflow":  # which knows all intervals
        kind = {"dx": "a DX student", "mean": "a student of objective=shortcut_regression"}.get(run.policy.type)
        require(
            kind is None or config.nfe == run.distill.nfe,
            f"nfe={config.nfe}: {kind} is sampled at the {run.distill.nfe} evaluations it was trained for.",
        )
        require(
            config.nfe >= run.distill.nfe,
            f"nfe={config.nfe} is below the {run.distill.nfe} evaluations this student was trained for. "
            f"Use {run.distill.nfe} or more.",
        )
    if run.distils and run.mode == "tied":
        check_trained_on(checkpoint, run)
    heads, tp = run.model.num_attention_heads, config.parallel.tp
    require(heads % tp == 0, f"parallel.tp={tp} does not divide the model's {heads} attention heads. Choose a divisor.")
    images = list_images(prompt_lines(config, dataset), seeds_of(config), usual_size(config, dataset))
    for image in images:
        check_size(image, dataset)
    return SampleRequest(config, run, checkpoint, dataset, images)


def refuse_idle_keys(config: SampleConfig, run: Config) -> None:
    """What would change nothing was meant for another source."""
    kind, other = ("student", "teacher") if run.distils else ("teacher", "student")
    defaults = SampleConfig()
    for name in ONLY_OF[other]:
        value = getattr(config, name)
        require(
            value == getattr(defaults, name),
            f"{name}={value} is for {other}s, and source={config.source} is a {kind}. Leave it out. "
            f"A {kind} has: {', '.join(ONLY_OF[kind])}.",
        )
    require(
        kind == "teacher" or run.policy.type == "gmflow" or config.temperature == "auto",
        f"temperature={config.temperature} is for GMFlow students, and source={config.source} has policy.type={run.policy.type}. Leave it out.",
    )
    fixed = {
        "dx": "a DX policy's outputs stand for points in time that its own shift places",
        "mean": "a mean policy was trained on segments whose ends its own shift places",
    }
    require(
        kind == "teacher" or run.policy.type not in fixed or config.shift is None,
        f"shift={config.shift}: {fixed.get(run.policy.type)}. Leave it out.",
    )
    require(
        not run.model.guidance_embeds or tuple(config.guidance_interval) == EVERYWHERE,
        f"guidance_interval={list(config.guidance_interval)} acts on two velocities, and source={config.source} answers with the guided "
        "one (model.guidance_embeds=true). Leave it out.",
    )
    require(
        not config.merge or run.mode == "tied",
        f"merge=true: source={config.source} has no adapters (mode={run.mode}). Leave it out.",
    )
    require(
        not config.mlflow or diffusers_folder(str(config.source)) is None,
        f"mlflow=true: source={config.source} is an exported folder, which belongs to no MLflow run. Leave it out.",
    )


def resolve_source(config: SampleConfig) -> tuple[Path, Config]:
    """A checkpoint or an exported folder, and the configuration of the run that it is of, or could be of."""
    folder = diffusers_folder(config.source)
    if folder is None:
        checkpoint = resolve_checkpoint(config.source, "source")
        run = read_run_config(checkpoint)
        return checkpoint, dataclasses.replace(
            run,
            distill=dataclasses.replace(run.distill, teacher=config.base or run.distill.teacher),
            data=dataclasses.replace(run.data, root=config.dataset or run.data.root),
        )
    require(
        config.dataset is not None,
        f"source={config.source} is an exported folder, which knows no data. Give dataset=DIR, prepared data whose codec, prompt "
        "encoder and latent size are to be used.",
    )
    if student_folder(config.source) is None:
        return folder, teacher_config(folder, config.dataset)
    student = open_student(folder)
    run = student_config(student, config.base, config.dataset)
    if student.lora is not None:
        check_base(student, open_teacher(run), f"base={config.base}")
    found = load_dataset(run)
    for option, wanted in student.trained_on.items():
        require(
            dict(getattr(found, option)) == wanted,
            f"dataset={config.dataset} was made with the {option} {dict(getattr(found, option))}, {folder} was trained on {wanted}.",
        )
    return folder, run


def load_dataset(run: Config) -> DatasetDescription:
    """What is known of the data whose codec and prompts are used. Raises ConfigError where it does not fit the model."""
    try:
        found = load_description(run.data.root)
        downscale_of(found.codec)  # whose VAE may have moved
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"dataset={run.data.root}: {error}") from error
    for what, theirs, ours in (
        ("latents of channels", found.latent_channels, run.model.latent_channels),
        ("prompt embeddings of width", found.prompt_dim, run.model.joint_attention_dim),
        ("pooled prompts of width", found.pooled_dim, run.model.pooled_projection_dim),
    ):
        require(theirs in (None, ours), f"dataset={run.data.root} holds {what} {theirs}, the model wants {ours}.")
    return found


def prompt_lines(config: SampleConfig, dataset: DatasetDescription) -> list[dict[str, Any]]:
    if config.prompts is not None:
        return read_prompts(Path(config.prompts))
    require(bool(dataset.prompts), f"{dataset.location} lists no prompts. Give prompts=FILE, one a line.")
    return [{"prompt": prompt} for prompt in dataset.prompts]


def usual_size(config: SampleConfig, dataset: DatasetDescription) -> tuple[int, int]:
    """(height, width) in pixels of images whose prompt says no other."""
    if config.size is not None:
        return config.size, config.size
    if config.height is not None:
        return config.height, config.width
    _, height, width = dataset.typical_shape
    return height * downscale_of(dataset.codec), width * downscale_of(dataset.codec)


def check_size(image: ImageRequest, dataset: DatasetDescription) -> None:
    step = downscale_of(dataset.codec) * PATCH
    for name in ("height", "width"):
        value = getattr(image, name)
        require(
            value > 0 and value % step == 0,
            f"prompt {image.prompt_index}: {name}={value} is no multiple of {step} pixels (a token's size). "
            f"Use {max(1, value // step) * step}.",
        )
