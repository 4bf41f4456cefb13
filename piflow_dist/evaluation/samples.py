"""Reading what tools/sample.py wrote, with every check that later code relies on.

B samples, C latent channels, H W latent size; images are (B, c, h, w) with their own size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class EvaluationError(ValueError):
    """Input that cannot be evaluated; the message names the file, the reason and what to do."""


@dataclass(frozen=True, kw_only=True)
class SampleFolder:
    """One folder of samples. All lists and tensors are in the order of `index` in manifest.jsonl."""

    path: Path
    images_BCHW: Tensor
    """uint8."""
    latents_BCHW: Tensor | None
    """float32, finite; None where the folder has none (latents=false)."""
    prompts: list[str]
    seeds: list[int]
    files: list[Path]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        """teacher or student."""
        return self.meta["kind"]

    @property
    def steps(self) -> int:
        """Sampling steps: nfe of a student, Euler steps of a teacher."""
        return int(self.meta["nfe" if self.kind == "student" else "steps"])

    @property
    def title(self) -> str:
        """As the label of a row."""
        return f"student, {self.steps} NFE" if self.kind == "student" else f"teacher, {self.steps} steps"

    @property
    def phrase(self) -> str:
        """As part of a sentence, after "the"."""
        return f"student at {self.steps} NFE" if self.kind == "student" else f"{self.steps}-step teacher"

    def __len__(self) -> int:
        return len(self.prompts)


def load_samples(path: Path | str) -> SampleFolder:
    """Read and check a sample folder.

    Raises EvaluationError where a file is missing or damaged, where the manifest does not number the images, where they
    have several sizes, or where latents are not finite.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder. Give a folder that tools/sample.py wrote.")
    meta = _read_meta(path / "meta.json")
    lines = read_jsonl(path / "manifest.jsonl", ("index", "seed", "prompt", "file"))
    lines.sort(key=lambda line: line["index"])  # with gaps where an image could not be made
    if len({line["index"] for line in lines}) != len(lines) or len(lines) != meta["images"]:
        raise EvaluationError(
            f"{path} does not hold one set of samples: {meta['images']} images in meta.json, {len(lines)} lines in "
            "manifest.jsonl, each with an index of its own. Sample it again."
        )
    has_latents = all("latents" in line for line in lines)
    return SampleFolder(
        path=path,
        images_BCHW=_stack(path, [read_image(path / line["file"]) for line in lines], "images"),
        latents_BCHW=_finite(path, [read_latents(path / line["latents"]) for line in lines]) if has_latents else None,
        prompts=[line["prompt"] for line in lines],
        seeds=[line["seed"] for line in lines],
        files=[path / line["file"] for line in lines],
        meta=meta,
    )


def read_image(path: Path) -> Tensor:
    """(c, h, w), uint8."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture))
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing. Run tools/sample.py again.") from error
    except (OSError, UnidentifiedImageError, SyntaxError) as error:  # PIL's answers to damaged files
        raise EvaluationError(f"{path} is damaged ({error}). Delete it, and run tools/sample.py again.") from error
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def read_latents(path: Path) -> Tensor:
    """(C, H, W), float32."""
    try:
        latents_CHW = load_file(path)["latents"]
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing. Run tools/sample.py again.") from error
    except (SafetensorError, KeyError) as error:
        raise EvaluationError(f"{path} is damaged ({error}). Delete it, and run tools/sample.py again.") from error
    if latents_CHW.dtype != torch.float32 or latents_CHW.dim() != 3:
        raise EvaluationError(f"{path} has no latents of three axes and type torch.float32.")
    return latents_CHW


def _stack(path: Path, tensors: list[Tensor], what: str) -> Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise EvaluationError(
            f"{path} holds {what} of several sizes ({shapes}). Sample each size into a folder of its own."
        )
    return torch.stack(tensors)


def _finite(path: Path, latents: list[Tensor]) -> Tensor:
    latents_BCHW = _stack(path, latents, "latents")
    finite_B = latents_BCHW.isfinite().flatten(1).all(dim=1)
    if not finite_B.all():
        bad = (~finite_B).nonzero().flatten().tolist()
        raise EvaluationError(
            f"{path}: {len(bad)} of {len(latents)} latents are not finite (first at index {bad[0]}). The sampler or its "
            "weights diverged; such samples cannot be measured."
        )
    return latents_BCHW


def check_same_noises(samples: SampleFolder, reference: SampleFolder) -> None:
    """Raise EvaluationError unless both folders hold the same prompts and seeds in the same order, at the same size."""
    if len(samples) != len(reference):
        raise EvaluationError(
            f"{samples.path} holds {len(samples)} samples and {reference.path} {len(reference)}: they are compared "
            "image by image from the same noises. Sample both with the same prompts and seeds."
        )
    for index in range(len(samples)):
        mine = (samples.seeds[index], samples.prompts[index])
        theirs = (reference.seeds[index], reference.prompts[index])
        if mine != theirs:
            raise EvaluationError(
                f"Sample {index} of {samples.path} has seed {mine[0]} and prompt {mine[1]!r}, in {reference.path} seed "
                f"{theirs[0]} and prompt {theirs[1]!r}. Sample both with the same prompts and seeds."
            )
    for what in ("images_BCHW", "latents_BCHW"):
        found = [getattr(folder, what) for folder in (samples, reference)]
        mine, theirs = (None if tensor is None else tuple(tensor.shape[1:]) for tensor in found)
        if None not in (mine, theirs) and mine != theirs:
            raise EvaluationError(f"{what[:-5]} are {mine} in {samples.path} and {theirs} in {reference.path}.")


def read_jsonl(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """One JSON object a line, each with at least `keys`. Raises EvaluationError naming file and line.

    A last line that was cut off by a kill (no line end, no JSON) is left out.
    """
    if not path.is_file():
        raise EvaluationError(f"{path} is missing.")
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise EvaluationError(f"{path}, line {number} is not JSON: {error}.") from error
        absent = [key for key in keys if not isinstance(row, dict) or key not in row]
        if absent:
            raise EvaluationError(f"{path}, line {number} has no {', '.join(absent)}: {text[:80]}")
        rows.append(row)
    return rows


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EvaluationError(f"{path} is missing: sampling was not finished. Run tools/sample.py again.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not JSON: {error}.") from error
    if meta.get("kind") not in ("teacher", "student"):
        raise EvaluationError(f"{path}: kind={meta.get('kind')!r} should be teacher or student.")
    steps = "nfe" if meta["kind"] == "student" else "steps"
    absent = [key for key in (steps, "seconds", "images", "network_evaluations") if meta.get(key) is None]
    if absent:
        raise EvaluationError(f"{path} has no {', '.join(absent)}.")
    if meta["images"] < 1:
        raise EvaluationError(f"{path}: images={meta['images']}, nothing was sampled.")
    return meta
