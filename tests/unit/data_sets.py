"""Small data sets for the tests of data_pipeline."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.description import DatasetDescription
from data_pipeline.prompts import TokenTableEncoder, vocabulary
from data_pipeline.source import RawSample
from data_pipeline.writing import SplitWriter

PROMPTS = ("a red square", "a blue disc", "a very large green ring")


def write_set(
    root: Path,
    *,
    train: Mapping[tuple[int, int], int] | int = 50,
    test: int = 6,
    shard_bytes: int = 4096,
) -> DatasetDescription:
    """Random 4-channel latents; `train` gives samples per latent size, or of size 4 x 4. A shard holds about 20."""
    generator = torch.Generator().manual_seed(0)
    encoder = TokenTableEncoder(vocabulary(PROMPTS), dim=8)
    sizes = {"train": {(4, 4): train} if isinstance(train, int) else train, "test": {(4, 4): test}}
    bucket_lists = {}
    for split, counts in sizes.items():
        writer = SplitWriter(root / split, encoder, shard_bytes, keep_images=True)
        for (height, width), count in counts.items():
            samples = [
                RawSample(f"{split}-{height}x{width}-{i:03d}", PROMPTS[i % len(PROMPTS)], b"file %d" % i)
                for i in range(count)
            ]
            writer.write(samples, torch.randn(count, 4, height, width, generator=generator))
        bucket_lists[split] = writer.finish()
    description = DatasetDescription(
        root=root,
        bucket_lists=bucket_lists,
        codec={"kind": "block_dct", "image_channels": 1, "block": 2, "scale": 1.0},
        prompt_encoder=encoder.describe(),
        prompt_dim=encoder.dim,
        prompts=tuple(sorted(PROMPTS)),
        source={"name": "random"},
        request={},
        created_by={},
    )
    description.write()
    return description


class RandomImages:
    """A source of random 8 x 8 grey images. `broken` names a key whose file is cut short."""

    splits = ("train", "test")

    def __init__(self, broken: str | None = None):
        self._broken = broken
        self.reads = 0

    def count(self, split: str) -> int:
        return {"train": 40, "test": 8}[split]

    def samples(self, split: str) -> Iterator[RawSample]:
        random = np.random.RandomState(self.splits.index(split))
        for i in range(self.count(split)):
            self.reads += 1
            key, encoded = f"{split}-{i:02d}", png(random.randint(0, 256, (8, 8), dtype=np.uint8))
            yield RawSample(key, PROMPTS[i % 3], encoded[:-30] if key == self._broken else encoded)

    def captions(self) -> list[str]:
        return sorted(PROMPTS)

    def describe(self) -> dict[str, Any]:
        return {"name": "random"}


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()
