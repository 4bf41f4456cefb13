"""The embedding of "" beside a set: training needs no more of the prompt encoder, whose weights may be tens of GB.

L text tokens  D width
"""

import hashlib
import tempfile
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from data_pipeline.description import EMPTY_PROMPT, DatasetDescription
from data_pipeline.errors import DataError
from data_pipeline.prompts import PromptEncoder, load_prompt_encoder
from data_pipeline.store import read_stored

NAME = "prompt_embeds"


def write_empty_prompt(root: Path, encoder: PromptEncoder) -> str:
    """Write <root>/empty_prompt.safetensors, bfloat16 as in the shards. Returns its sha256."""
    (embed_LD,) = encoder.encode([""])
    content = save({NAME: embed_LD.bfloat16().contiguous()})
    (root / EMPTY_PROMPT).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_empty_prompt(description: DatasetDescription) -> Tensor:
    """(L,D) float32 on the CPU: the unconditional prompt. Sets of earlier versions have to ask their encoder.

    Raises DataError where the file is missing or not the one that dataset.json describes.
    """
    if description.empty_prompt is None:
        return load_prompt_encoder(description.prompt_encoder).encode([""])[0]
    with tempfile.TemporaryDirectory() as scratch:
        content = read_stored(description.location, EMPTY_PROMPT, Path(scratch) / EMPTY_PROMPT)
    if hashlib.sha256(content).hexdigest() != description.empty_prompt:
        raise DataError(
            f"{description.location}/{EMPTY_PROMPT} is damaged (its sha256 is not dataset.json's). Restore it."
        )
    return load(content)[NAME].float()
