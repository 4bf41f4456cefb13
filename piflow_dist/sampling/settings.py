"""Settings of tools/sample.py, and what they mean for a given source."""

import dataclasses
import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_pipeline.description import DatasetDescription, load_description
from piflow_dist.checkpoint.files import MANIFEST
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import Config, ConfigError, LaunchConfig, require, require_positive
from piflow_dist.models.adapters import check_base, open_student, student_config, student_folder, teacher_config
from piflow_dist.models.pretrained import DiffusersWeights, check_trained_on, diffusers_folder, open_teacher


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
    """Text file, one prompt a line; default: the distinct prompts of the training data."""
    images_per_prompt: int = 1
    seed: int = 0
    """Image i of the request has the noise of (seed, i), whatever the batch or the number of processes."""
    nfe: int | None = None
    """Student evaluations per image; default: as trained."""
    steps: int = 100
    """Euler steps of a teacher."""
    guidance: float = 1.0
    """Guidance scale of a teacher."""
    temperature: str = "auto"
    """Of a GMFlow student, at every step but the last: a number, or auto = 0.1 (nfe - 1)."""
    h: str = "0"
    """Noise of a student's flow-map sampler: 0 is the ODE, inf draws all noise afresh."""
    substeps: int = 128
    """Policy substeps over the whole trajectory."""
    ema: bool = True
    """Averaged weights, or the raw ones."""
    batch_size: int = 64
    overwrite: bool = False
    """Replace images of other settings in the same folder."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self):
        require_positive("sample", self, "images_per_prompt", "steps", "substeps", "batch_size")
        require(self.nfe is None or self.nfe > 0, f"nfe={self.nfe} must be greater than zero.")
        require(self.guidance >= 1, f"guidance={self.guidance} is below 1. Use 1 for none.")
        if self.temperature != "auto":
            require(
                0 < number("temperature", self.temperature) <= 1, f"temperature={self.temperature} must lie in (0, 1]."
            )
        require(number("h", self.h) >= 0, f"h={self.h} must be 0 (ODE) or more.")


ONLY_OF = {"teacher": ("steps", "guidance"), "student": ("nfe", "temperature", "h", "substeps")}
"""Keys that mean something for one kind of source."""


def part_path(out: Path, part: int) -> Path:
    return out / "parts" / f"part_{part:05d}.safetensors"


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
    prompts: list[str]
    """One per image."""

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

    def image_seed(self, index: int) -> int:
        digest = hashlib.blake2b(f"{self.config.seed},{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def parts(self) -> list[range]:
        """Image indices, in batches that are written as one file."""
        return [
            range(start, min(start + self.config.batch_size, len(self.prompts)))
            for start in range(0, len(self.prompts), self.config.batch_size)
        ]

    def identity(self) -> dict[str, Any]:
        """Everything the pixels depend on."""
        settings = asdict(self.config)
        others = ONLY_OF["teacher" if self.kind == "student" else "student"]
        for name in ("out", "overwrite", "launch", "source", "prompts", "images_per_prompt", *others):
            settings.pop(name)
        exported = diffusers_folder(str(self.checkpoint)) is not None
        manifest = self.checkpoint / MANIFEST
        weights = (
            DiffusersWeights(self.checkpoint, self.run.model).fingerprint()
            if exported
            else hashlib.sha256(manifest.read_bytes()).hexdigest()
        )
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {**settings, "images": len(self.prompts), "prompts_sha256": prompts, "weights_sha256": weights}


def build_request(config: SampleConfig) -> SampleRequest:
    """Resolve source and prompts. Raises ConfigError for what cannot be sampled."""
    checkpoint, run = resolve_source(config)
    load_dataset(run)
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
    prompts = [prompt for prompt in read_prompts(config, run) for _ in range(config.images_per_prompt)]
    return SampleRequest(config, run, checkpoint, prompts)


def refuse_idle_keys(config: SampleConfig, run: Config) -> None:
    """What would change nothing was meant for another source."""
    kind, other = ("student", "teacher") if run.distils else ("teacher", "student")
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    for name in ONLY_OF[other]:
        value = getattr(config, name)
        require(
            value == defaults[name],
            f"{name}={value} is for {other}s, and source={config.source} is a {kind}. Leave it out. "
            f"A {kind} has: {', '.join(ONLY_OF[kind])}.",
        )
    require(
        kind == "teacher" or run.policy.type == "gmflow" or config.temperature == "auto",
        f"temperature={config.temperature} is for GMFlow students, and source={config.source} has policy.type={run.policy.type}. Leave it out.",
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
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"dataset={run.data.root}: {error}") from error
    for what, theirs, ours in (
        ("latents of channels", found.latent_channels, run.model.latent_channels),
        ("prompt embeddings of width", found.prompt_dim, run.model.joint_attention_dim),
    ):
        require(theirs == ours, f"dataset={run.data.root} holds {what} {theirs}, the model wants {ours}.")
    return found


def read_prompts(config: SampleConfig, run: Config) -> list[str]:
    if config.prompts is None:
        prompts = list(load_description(run.data.root).prompts)
        require(bool(prompts), f"{run.data.root} lists no prompts. Give prompts=FILE, one a line.")
        return prompts
    path = Path(config.prompts)
    require(path.is_file(), f"prompts={path} does not exist. Give a text file, one prompt a line.")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    require(bool(prompts), f"prompts={path} is empty. Write one prompt a line.")
    return prompts
