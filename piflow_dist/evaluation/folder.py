"""A folder of samples read image by image, as its manifest lists them: it may hold more than fits into memory.

B samples, C latent channels, H W latent size; images are (c, h, w) with their own size.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piflow_dist.checkpoint.files import CheckpointError, read_json
from piflow_dist.evaluation.samples import EvaluationError, read_jsonl

TOGETHER = "samples.safetensors"
"""Latents of a whole folder, where they are not one file an image."""


@dataclass(frozen=True, eq=False)
class SampleList:
    """What the manifest says, in the order of `index`; files are opened when they are asked for."""

    path: Path
    meta: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def kind(self) -> str:
        """teacher or student."""
        return self.meta["kind"]

    @property
    def steps(self) -> int:
        return int(self.meta["nfe" if self.kind == "student" else "steps"])

    @property
    def title(self) -> str:
        if self.kind == "student":
            return f"student, {self.steps} NFE"
        guidance = self.meta.get("guidance")
        return f"teacher, {self.steps} steps" + (f", guidance {guidance:g}" if guidance and guidance > 1 else "")

    @property
    def prompts(self) -> list[str]:
        return [line["prompt"] for line in self.lines]

    @cached_property
    def noises(self) -> list[tuple[str, int, int]]:
        """Prompt and seed of each image, and how many of both there were before: a file of prompts may list one twice."""
        seen: Counter[tuple[str, int]] = Counter()
        found = []
        for line in self.lines:
            key = (line["prompt"], line["seed"])
            found.append((*key, seen[key]))
            seen[key] += 1
        return found

    def __len__(self) -> int:
        return len(self.lines)

    def image(self, index: int) -> Tensor:
        """(c, h, w) uint8."""
        return read_image(self.path / self.lines[index]["file"])

    def latent(self, index: int) -> Tensor | None:
        """(C, H, W) float32; None where the folder keeps none."""
        file = self.lines[index].get("latents")
        if file is not None:
            path = self.path / file
            try:
                with safe_open(path, framework="pt") as tensors:
                    (name,) = tensors.keys()
                    return tensors.get_tensor(name).float().reshape(tensors.get_tensor(name).shape[-3:])
            except (OSError, SafetensorError, ValueError) as error:
                raise EvaluationError(f"{path} does not hold one latent ({error}). Sample it again.") from error
        return None if self._latents is None else self._latents[index].float()

    @cached_property
    def _latents(self) -> Any:
        """Rows of TOGETHER, read one by one."""
        path = self.path / TOGETHER
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_slice("latents")
        except SafetensorError as error:
            raise EvaluationError(f"{path} is damaged ({error}). Sample it again.") from error


def open_samples(path: Path | str) -> SampleList:
    """Raises EvaluationError where the folder is not a finished one of tools/sample.py."""
    path = Path(path)
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder. Give a folder that tools/sample.py wrote.")
    try:
        meta = read_json(path / "meta.json")
    except (OSError, CheckpointError) as error:
        raise EvaluationError(f"{path / 'meta.json'}: sampling was not finished. Run tools/sample.py again.") from error
    if meta.get("kind") not in ("teacher", "student"):
        raise EvaluationError(f"{path / 'meta.json'}: kind={meta.get('kind')!r} should be teacher or student.")
    steps = "nfe" if meta["kind"] == "student" else "steps"
    absent = [key for key in (steps, "seconds", "images", "network_evaluations") if meta.get(key) is None]
    if absent:
        raise EvaluationError(f"{path / 'meta.json'} has no {', '.join(absent)}.")
    lines = read_jsonl(path / "manifest.jsonl", ("index", "seed", "prompt", "file"))
    lines.sort(key=lambda line: line["index"])
    if not lines:
        raise EvaluationError(f"{path / 'manifest.jsonl'} lists no images. Sample again.")
    if len({line["index"] for line in lines}) != len(lines):
        raise EvaluationError(f"{path / 'manifest.jsonl'} lists an image twice. Sample again.")
    missing = next((line["file"] for line in lines if not (path / line["file"]).is_file()), None)
    if missing is not None:
        raise EvaluationError(f"{path / missing} is missing, and the manifest lists it. Run tools/sample.py again.")
    return SampleList(path, meta, lines)


def pair_up(samples: SampleList, reference: SampleList) -> dict[int, int]:
    """Place of an image -> that of the reference's from the same prompt and seed; an image that either could not make has none.

    Raises EvaluationError where there is no pair.
    """
    places = {key: place for place, key in enumerate(reference.noises)}
    pairs = {place: places[key] for place, key in enumerate(samples.noises) if key in places}
    if not pairs:
        (prompt, seed, _), (their_prompt, their_seed, _) = samples.noises[0], reference.noises[0]
        raise EvaluationError(
            f"{samples.path} and {reference.path} have no prompt and seed in common (the first: {prompt!r} with {seed}, and "
            f"{their_prompt!r} with {their_seed}): they are compared image by image from the same noises. Sample both with the "
            "same prompts and seeds, or leave reference= out."
        )
    return pairs


def distinct_titles(folders: list[SampleList]) -> list[str]:
    """Of rows in one table: with the folder's name where titles alone are the same."""
    titles = [samples.title for samples in folders]
    return [
        f"{title} ({samples.name})" if titles.count(title) > 1 else title
        for title, samples in zip(titles, folders, strict=True)
    ]


def read_image(path: Path) -> Tensor:
    """(c, h, w) uint8, c = 1 or 3. Raises EvaluationError where it is no image."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise EvaluationError(f"{path} cannot be read as an image ({error}).") from error
    tensor = torch.from_numpy(pixels.copy())
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.permute(2, 0, 1).contiguous()
