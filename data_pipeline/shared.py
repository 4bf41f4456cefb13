"""What all parts of a preparation share: codec and prompt encoder, with what they have to learn from the source."""

from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.buckets import crop_box, make_buckets, nearest_bucket
from data_pipeline.codec import BlockCodec, load_codec
from data_pipeline.decode import CropDecoder
from data_pipeline.description import load_description
from data_pipeline.plan import OpenItems
from data_pipeline.prepare_settings import PrepareConfig
from data_pipeline.prompts import TokenTableEncoder, vocabulary
from data_pipeline.reading import ReadSample, SampleReader

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
    if config.codec == "qwen_image_vae":
        return {"kind": "qwen_image_vae", "path": str(Path(config.model_path)), "dtype": "float32"}
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
    if config.prompt_encoder == "qwen2_5_vl":
        path = str(Path(config.model_path))
        return {"kind": "qwen2_5_vl", "path": path, "dtype": "bfloat16", "max_tokens": 512}
    captions = {caption for item in open_items() if (caption := reader.read_caption(item)) is not None}
    return TokenTableEncoder(vocabulary(sorted(captions)), dim=config.prompt_dim).describe()
