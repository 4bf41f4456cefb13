"""Raw samples -> latents -> MDS shards, one bucket per latent size.

B batch  C latent channels  H W latent size  c image channels  h w image size
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.codec import Codec
from data_pipeline.compat import repair_torchvision
from data_pipeline.decode import Decoder
from data_pipeline.description import HASH, Bucket, read_index
from data_pipeline.errors import DataError
from data_pipeline.prompts import PromptEncoder
from data_pipeline.source import RawSample

COMPRESSION = "zstd:7"


class Writable(Protocol):
    """What a row of a shard is made from, beside its latents: a RawSample or a ReadSample."""

    key: str
    caption: str
    encoded: bytes


def in_batches(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch


def encode_images(
    batch: list[RawSample], codec: Codec, decoder: Decoder, device: str
) -> Iterator[tuple[list[RawSample], Tensor]]:
    """Groups of samples whose images have one size, each with its latents (B,C,H,W) float32 on the CPU."""
    images = decoder.decode([sample.encoded for sample in batch], [sample.key for sample in batch])
    for size in dict.fromkeys(image.shape for image in images):
        members = [i for i, image in enumerate(images) if image.shape == size]
        pixels_Bhwc = torch.from_numpy(np.stack([images[i] for i in members])).to(device)
        images_Bchw = pixels_Bhwc.permute(0, 3, 1, 2).float() / 127.5 - 1
        yield [batch[i] for i in members], codec.encode(images_Bchw).cpu()


def latent_deviation(
    batches: Iterable[list[RawSample]],
    codec: Codec,
    decoder: Decoder,
    device: str,
    advance: Callable[[int], None],
) -> float:
    """Standard deviation of all latent values together, accumulated in float64."""
    count, total, total_of_squares = 0, 0.0, 0.0
    for batch in batches:
        for _, latents_BCHW in encode_images(batch, codec, decoder, device):
            values = latents_BCHW.double()
            count += values.numel()
            total += values.sum().item()
            total_of_squares += values.square().sum().item()
        advance(len(batch))
    variance = total_of_squares / count - (total / count) ** 2 if count else 0.0
    if not variance > 0:
        raise DataError(f"{count} latent values have variance {variance}: the source has no images.")
    return variance**0.5


class SplitWriter:
    """Writes one split, or a part of it, below `folder`: a bucket per latent size, samples in the order they come."""

    def __init__(self, folder: Path, prompt_encoder: PromptEncoder, shard_bytes: int, keep_images: bool):
        repair_torchvision()
        from streaming import MDSWriter  # imported here: it takes seconds, and finished sets need no writer

        self._mds_writer = MDSWriter
        self._folder, self._prompt_encoder = folder, prompt_encoder
        self._shard_bytes, self._keep_images = shard_bytes, keep_images
        self._writers: dict[tuple[int, int, int], Any] = {}
        self._embeds: dict[str, np.ndarray] = {}

    def write(self, samples: Sequence[Writable], latents_BCHW: Tensor) -> None:
        """Latents are stored as float16. Raises DataError naming the sample whose latents do not fit in it."""
        half_BCHW = latents_BCHW.half()
        if not half_BCHW.isfinite().all():
            first = int((~half_BCHW.isfinite()).flatten(1).any(dim=1).nonzero()[0])
            raise DataError(f"Sample {samples[first].key}: its latents are not finite numbers of float16 range.")
        self._write(samples, tuple(latents_BCHW.shape[1:]), half_BCHW.numpy())

    def write_without_latents(self, samples: Sequence[Writable], latent_shape: tuple[int, int, int]) -> None:
        """For sets that are encoded in training, or that have prompts only. One writer takes either kind, not both."""
        self._write(samples, latent_shape, None)

    def _write(self, samples: Sequence[Writable], shape: tuple[int, int, int], half_BCHW: np.ndarray | None) -> None:
        writer = self._writer(shape, half_BCHW is not None)
        embeds = self._encode_prompts([sample.caption for sample in samples])
        for i, (sample, embed_LD) in enumerate(zip(samples, embeds, strict=True)):
            row = {"prompt_embeds": embed_LD, "prompt": sample.caption, "key": sample.key}
            if half_BCHW is not None:
                row["latents"] = half_BCHW[i]
            if self._keep_images:
                row["image"] = sample.encoded
            writer.write(row)

    def finish(self) -> tuple[Bucket, ...]:
        """Write what is left; the buckets as dataset.json describes them."""
        buckets = []
        for shape, writer in self._writers.items():
            writer.finish()
            name = bucket_name(shape)
            shards = read_index(self._folder / name / "index.json")
            buckets.append(Bucket(name, sum(shard.samples for shard in shards), shape, shards))
        return tuple(sorted(buckets, key=lambda bucket: bucket.name))

    def _writer(self, shape: tuple[int, int, int], with_latents: bool) -> Any:
        if shape not in self._writers:
            columns = {
                "prompt_embeds": "ndarray:uint16",  # (L, D) bfloat16 bits
                "prompt": "str",
                "key": "str",
            }
            if with_latents:
                columns["latents"] = f"ndarray:float16:{','.join(map(str, shape))}"
            if self._keep_images:
                columns["image"] = "bytes"
            self._writers[shape] = self._mds_writer(
                out=str(self._folder / bucket_name(shape)),
                columns=columns,
                compression=COMPRESSION,
                hashes=[HASH],
                size_limit=self._shard_bytes,
            )
        return self._writers[shape]

    def _encode_prompts(self, prompts: list[str]) -> list[np.ndarray]:
        """Each distinct prompt of the batch once; those of the previous batch are still known."""
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._embeds]
        known = {prompt: self._embeds[prompt] for prompt in distinct if prompt in self._embeds}
        encoded = self._prompt_encoder.encode(new) if new else []
        self._embeds = known | {p: to_bfloat16_bits(e) for p, e in zip(new, encoded, strict=True)}
        return [self._embeds[prompt] for prompt in prompts]


def to_bfloat16_bits(tensor: Tensor) -> np.ndarray:
    """Numpy has no bfloat16: shards hold the 16 bits as uint16."""
    return tensor.bfloat16().contiguous().view(torch.int16).cpu().numpy().view(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def bucket_name(latent_shape: tuple[int, int, int]) -> str:
    return f"{latent_shape[1]}x{latent_shape[2]}"
