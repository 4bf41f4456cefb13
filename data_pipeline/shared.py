"""What all parts of a preparation share: codec and prompt encoder, with what they have to learn from the source."""

from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.buckets import crop_box, make_buckets, nearest_bucket
from data_pipeline.class_labels import ClassLabelEncoder, in_label_order, read_labels
from data_pipeline.codec import BlockCodec, load_codec
from data_pipeline.decode import CropDecoder
from data_pipeline.description import load_description
from data_pipeline.errors import DataError
from data_pipeline.plan import OpenItems
from data_pipeline.prepare_settings import WITHOUT_WEIGHTS, PrepareConfig
from data_pipeline.prompts import PromptEncoder, TokenTableEncoder, vocabulary
from data_pipeline.reading import ReadSample, SampleReader

MOST_CLASSES = 100_000
"""More are captions that were taken for names of classes."""
SAMPLES_MEASURED = 256
"""From which the scale of the block transform is taken."""


def describe_shared(config: PrepareConfig, open_items: OpenItems) -> dict[str, Any]:
    """Descriptions for `load_codec` and `load_prompt_encoder`, and the latent shape of sets of prompts only."""
    reader = SampleReader(config.limits(), config.image_column, config.caption_column)
    shape = None
    if config.like:
        other = load_description(config.like)
        codec, prompt_encoder = dict(other.codec), dict(other.prompt_encoder)
        if not config.has_images() and config.resolution is None:
            shape = other.latent_shape
    else:
        codec = _describe_codec(config, reader, open_items)
        prompt_encoder = _describe_prompt_encoder(config, reader, open_items)
    if not config.has_images() and shape is None:
        opened = load_codec(codec)
        side = config.resolution // config.bucket_step * config.bucket_step // opened.downscale
        shape = (opened.latent_channels, side, side)
    return {"codec": codec, "prompt_encoder": prompt_encoder, "prompt_shape": shape}


def _describe_codec(config: PrepareConfig, reader: SampleReader, open_items: OpenItems) -> dict[str, Any]:
    if (pretrained := pretrained_codec(config)) is not None:
        return pretrained
    if not config.has_images():
        return BlockCodec(image_channels=3).describe()
    scale = 1 / _root_mean_square(config, reader, open_items)
    return BlockCodec(image_channels=3, scale=scale).describe()


def _root_mean_square(config: PrepareConfig, reader: SampleReader, open_items: OpenItems) -> float:
    """Root mean square of the pixels of the first samples; the transform is orthogonal, so of its latents too."""
    buckets = make_buckets(config.resolution, config.bucket_step, config.max_aspect)
    decoder = CropDecoder(3, device=config.decode_device, batch_size=1, threads=1)
    count, total_of_squares = 0, 0.0
    samples = (sample for item in open_items() if isinstance(sample := reader.read(item), ReadSample))
    for sample in islice(samples, SAMPLES_MEASURED):
        bucket = nearest_bucket(sample.size, buckets)
        pixels_Bhwc, _ = decoder.crop([sample.encoded], [sample.size], [crop_box(sample.size, bucket)], bucket)
        values = pixels_Bhwc.double() / 127.5 - 1
        count += values.numel()
        total_of_squares += values.square().sum().item()
    if not total_of_squares > 0:
        return 1.0  # nothing decodes, which the parts will report with reasons; or all is black
    return (total_of_squares / count) ** 0.5


def _describe_prompt_encoder(config: PrepareConfig, reader: SampleReader, open_items: OpenItems) -> dict[str, Any]:
    if (pretrained := pretrained_prompt_encoder(config)) is not None:
        return pretrained
    captions = {caption for item in open_items() if (caption := reader.read_caption(item)) is not None}
    return encoder_of_captions(config, captions).describe()


def pretrained_codec(config: PrepareConfig) -> dict[str, Any] | None:
    """Its description, or None for the codec without weights. The path is absolute: samplers start in other folders."""
    if config.codec == "block_dct":
        return None
    return {"kind": config.codec, "path": str(Path(config.model_path).absolute()), "dtype": "float32"}


def pretrained_prompt_encoder(config: PrepareConfig) -> dict[str, Any] | None:
    """Its description, or None for those that are made of the captions."""
    if config.prompt_encoder in WITHOUT_WEIGHTS:
        return None
    path = str(Path(config.model_path).absolute())
    return {"kind": config.prompt_encoder, "path": path, "dtype": "bfloat16", "max_tokens": config.max_tokens}


def encoder_of_captions(config: PrepareConfig, captions: set[str]) -> PromptEncoder:
    """Raises DataError where a caption is not in the file of labels."""
    if config.prompt_encoder == "token_table":
        return TokenTableEncoder(vocabulary(sorted(captions)), dim=config.prompt_dim)
    if config.labels is None:
        if len(captions) > MOST_CLASSES:
            raise DataError(
                f"{len(captions):,} different captions are hardly classes. Choose another prompt_encoder, or give labels=FILE."
            )
        return ClassLabelEncoder(in_label_order(captions))
    encoder = read_labels(Path(config.labels))
    for caption in sorted(captions):
        try:
            encoder.label(caption)
        except ValueError as error:
            raise DataError(f"labels={config.labels} does not fit to path={config.path}: {error}") from error
    return encoder
