"""A small set of random latents, in the layout of prepared data: for tests and tools that need to train, not to learn."""

import math
from pathlib import Path

import torch

from data_pipeline.description import DatasetDescription
from data_pipeline.prompts import PromptEncoder, TokenTableEncoder, vocabulary
from data_pipeline.source import RawSample
from data_pipeline.writing import SplitWriter

PROMPTS = ("a red square", "a blue disc", "a very large green ring")


def write_random_set(
    root: Path,
    train: int = 40,
    test: int = 8,
    size: int = 4,
    dim: int = 64,
    prompts: tuple = PROMPTS,
    channels: int = 16,
    encoder: PromptEncoder | None = None,
) -> None:
    """Latents (channels, size, size) of standard normal numbers; no image, no download, the same bytes every time.

    dim: width of the prompt embeddings; or they are the encoder's. channels: a square.
    """
    generator = torch.Generator().manual_seed(0)
    encoder = encoder or TokenTableEncoder(vocabulary(prompts), dim=dim)
    bucket_lists = {}
    for split, count in {"train": train, "test": test}.items():
        writer = SplitWriter(root / split, encoder, 1 << 20, keep_images=False)
        samples = [RawSample(f"{split}-{i:03d}", prompts[i % len(prompts)], b"") for i in range(count)]
        writer.write(samples, torch.randn(count, channels, size, size, generator=generator))
        bucket_lists[split] = writer.finish()
    DatasetDescription(
        root=root,
        bucket_lists=bucket_lists,
        codec={"kind": "block_dct", "image_channels": 1, "block": math.isqrt(channels), "scale": 1.0},
        prompt_encoder=encoder.describe(),
        prompt_dim=encoder.dim,
        pooled_dim=encoder.pooled_dim,
        prompts=tuple(sorted(prompts)),
        source={"name": "random"},
        request={},
        created_by={},
    ).write()
