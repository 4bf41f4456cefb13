"""Settings of tools/evaluate.py."""

import dataclasses
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from piflow_dist.config import ConfigError, LaunchConfig, load_config, require, require_positive
from piflow_dist.evaluation.quality import QUALITY
from piflow_dist.sampling.settings import SampleConfig

UNSAFE = re.compile(r"[^\w.-]+")
"""What has no place in the name of a folder."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Compares folders of samples, or makes them first (docs/evaluation.md)."""

    samples: list[str] = field(default_factory=list)
    """Folders that tools/sample.py wrote: samples=[DIR,DIR,...]."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What to sample first, settings of tools/sample.py each: "sources=[{source:RUN,nfe:2},{source:TEACHER,steps:50,guidance:4}]"."""
    prompts: str | None = None
    """Of sources: text file, one prompt a line; default: the captions that the training data lists."""
    images_per_prompt: int = 1
    """Of sources. Diversity wants two or more."""
    seed: int = 0
    """Of sources' noises."""
    reference: str | None = None
    """Folder (or name) of the samples that the others are compared with image by image, from the same prompts and seeds."""
    real: str | None = None
    """Real images: a prepared set, a folder of images, or the .safetensors that stats= wrote; default: dataset."""
    real_split: str = "train"
    """Of a prepared set."""
    stats: str | None = None
    """Write the statistics of real= to this .safetensors; no samples are needed then."""
    dataset: str | None = None
    """A prepared set of few, short captions, on whose images a small feature network is trained where there is no inception=."""
    inception: str | None = None
    """Weights of torch-fidelity's InceptionV3, as safetensors."""
    clip: str | None = None
    """Folder of a CLIP model in transformers' layout."""
    lpips: str | None = None
    """Weights of torchmetrics' LPIPS (alex or vgg), as safetensors."""
    rewards: list[str] = field(default_factory=list)
    """Scores of your own, module:function of (images, prompts): rewards=[my_rewards:hpsv2]."""
    batch_size: int = 50
    """Images per pass of a network; the last digits of features may depend on it, and on nothing else."""
    resamples: int = 200
    """Of the images, for the intervals; 0: none."""
    out: str | None = None
    """Folder of the report; default: `evaluation` beside the first folder of samples."""
    name: str = "evaluation"
    """File name of the report without ending, and name of its MLflow run."""
    cache: str = "outputs/feature_net"
    """Folder that keeps trained feature networks and statistics of real images."""
    run: str | None = None
    """Training run whose MLflow run gets the result as a child; default: that of the first student that is tracked; `none`: no
    record."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self):
        require_positive("evaluate", self, "images_per_prompt", "batch_size")
        require(self.resamples >= 0, f"resamples={self.resamples} must not be negative. Use 0 for no intervals.")
        require(
            bool(self.samples or self.sources or self.stats),
            "Nothing to evaluate. Give samples=[DIR,...], or sources=[{source:RUN},...], or stats=FILE with real=.",
        )
        require(
            self.stats is None or (self.real is not None and self.stats.endswith(".safetensors")),
            f"stats={self.stats} is the .safetensors that the statistics of real= are written to. Give both.",
        )
        require(
            self.stats is None or bool(self.inception or self.dataset),
            "stats= are of a feature network's answers. Give inception=FILE, or dataset=DIR for the small network of a set.",
        )
        for entry in self.sources:
            require(
                "source" in entry,
                f"sources: {entry} names no source. Write {{source:RUN}} and settings of tools/sample.py.",
            )
        for entry in self.rewards:
            module, colon, function = entry.partition(":")
            require(bool(module and colon and function), f"rewards: {entry} is not of the form module:function.")
        names = Counter(entry.partition(":")[2] for entry in self.rewards) + Counter(metric.key for metric in QUALITY)
        for entry in self.rewards:
            name = entry.partition(":")[2]
            require(
                names[name] == 1,
                f"rewards: {entry} would be the second metric named {name}, which results are kept by. Import it under another "
                "name in a module of your own.",
            )

    @property
    def out_dir(self) -> Path:
        if self.out is not None:
            return Path(self.out)
        if self.samples:
            return Path(self.samples[0]).resolve().parent / "evaluation"
        return Path("outputs/evaluation") if self.stats is None else Path(f"{Path(self.stats).resolve()}.work")


LISTS = ("samples", "sources", "rewards")


def load_evaluation(overrides: list[str]) -> EvaluateConfig:
    """key=value arguments -> checked settings; samples=DIR is samples=[DIR]. Raises ConfigError."""
    whole = []
    for override in overrides:
        key, equals, value = override.partition("=")
        single = equals and key in LISTS and not value.startswith("[")
        whole.append(f"{key}=[{value}]" if single else override)
    try:
        return load_config(whole, EvaluateConfig, "evaluate")
    except ConfigError as error:
        given = [override for override in overrides if override.startswith("sources=")]
        if not given or "Dict[str, Any]" not in str(error):
            raise
        raise ConfigError(
            f"{' '.join(given)}: a source is {{source:RUN}} and settings of tools/sample.py, in braces, which a shell expands. Quote "
            'it: "sources=[{source:RUN,nfe:2},{source:TEACHER,steps:50}]".'
        ) from error


def sample_settings(config: EvaluateConfig, entry: dict[str, Any]) -> SampleConfig:
    """What tools/sample.py would be given for one of `sources`. Raises ConfigError."""
    known = {item.name for item in dataclasses.fields(SampleConfig)} | {"name"}
    unknown = sorted(set(entry) - known)
    require(not unknown, f"sources: {', '.join(unknown)} of {entry} is no setting of tools/sample.py.")
    shared = {
        "prompts": config.prompts,
        "images_per_prompt": config.images_per_prompt,
        "seed": config.seed,
        "latents": True,
    }
    values = {"out": str(config.out_dir / "samples" / source_name(entry)), **shared}
    values |= {key: value for key, value in entry.items() if key != "name"}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SampleConfig), {"launch": asdict(config.launch)}, values)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"sources: {entry}: {error}") from error


def source_name(entry: dict[str, Any]) -> str:
    """name=, or the run's with what differs from its defaults: student_nfe2."""
    if "name" in entry:
        return str(entry["name"])
    settings = [
        f"{key}{UNSAFE.sub('-', str(value)).strip('-')}"
        for key, value in entry.items()
        if key not in ("source", "base", "dataset", "out")
    ]
    return "_".join([Path(entry["source"]).name, *settings])
