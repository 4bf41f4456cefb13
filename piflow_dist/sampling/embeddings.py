"""Prompt embeddings on disk, one file per prompt, so that a second run need not load a text encoder of 7B parameters.

A file's name is a hash of the encoder's description and the prompt. Each prompt is encoded alone: beside others it would be
padded to their length, and its last bits would depend on them.
L text tokens, D width.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.prompts import load_prompt_encoder
from piflow_dist.sampling.images import replacing


class EmbeddingCache:
    """Embeddings by prompt, of one encoder."""

    def __init__(self, folder: Path, encoder: Mapping[str, Any]):
        self.folder, self.encoder = folder, encoder
        self.salt = json.dumps(encoder, sort_keys=True)

    def path(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self.salt}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def read(self, prompt: str) -> Tensor | None:
        """(L,D), float32; None where there is none, or a damaged one."""
        try:
            return load_file(self.path(prompt))["embedding"].float()
        except (OSError, SafetensorError, KeyError):
            return None

    def length(self, prompt: str) -> int:
        """L of an embedding that is there, from the file's header alone."""
        with safe_open(self.path(prompt), framework="pt") as file:
            return file.get_slice("embedding").get_shape()[0]

    def cut(self, prompt: str) -> str | None:
        """What the encoder left out of a prompt that is there, "" for nothing; None in files of earlier versions."""
        with safe_open(self.path(prompt), framework="pt") as file:
            return (file.metadata() or {}).get("cut")

    def encode(self, prompts: list[str], device: torch.device) -> dict[str, str]:
        """Encode the prompts that are not there yet. Returns the reason for each that cannot be."""
        missing = [prompt for prompt in prompts if self.read(prompt) is None or self.cut(prompt) is None]
        if not missing:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        encoder, reasons = load_prompt_encoder(self.encoder, device), {}
        for prompt in missing:
            try:
                (embedding_LD,), cut = encoder.encode([prompt]), encoder.cut(prompt)
            except ValueError as error:
                reasons[prompt] = str(error)
                continue
            if not embedding_LD.isfinite().all():
                reasons[prompt] = "its embedding is not finite."
                continue
            short_LD = embedding_LD.bfloat16()
            with replacing(self.path(prompt)) as temporary:
                # What encoders of two bytes answer is kept in two bytes, and nothing is rounded.
                kept_LD = short_LD if torch.equal(short_LD.float(), embedding_LD) else embedding_LD
                save_file({"embedding": kept_LD}, temporary, metadata={"cut": cut})
        return reasons
