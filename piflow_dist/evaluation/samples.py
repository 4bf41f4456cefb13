"""Reading what tools/sample.py wrote, with every check that later code relies on.

B samples, C latent channels, H W latent size; images are (c, h, w) with their own size.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, eq=False)
class SampleFolder:
    """What a manifest says, in the order of its `index`. Files are read when they are asked for: a folder may hold more than
    fits into memory."""

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
        """Sampling steps: nfe of a student, Euler steps of a teacher."""
        return int(self.meta["nfe" if self.kind == "student" else "steps"])

    @property
    def title(self) -> str:
        """As the label of a row."""
        return f"student, {self.steps} NFE" if self.kind == "student" else f"teacher, {self.steps} steps"

    @property
    def long_title(self) -> str:
        """The same where teachers may differ in their guidance."""
        return self.title + (f", guidance {self.guidance}" if self.guidance else "")

    @property
    def guidance(self) -> str:
        """Of a teacher's samples, as "3.2 in [0, 0.7]"; empty where there is none."""
        scale, (low, high) = self.meta.get("guidance"), self.meta.get("guidance_interval") or (0, 1)
        if self.kind != "teacher" or scale is None or scale <= 1:
            return ""
        return f"{scale:g}" + ("" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]")

    @property
    def phrase(self) -> str:
        """As part of a sentence, after "the"."""
        return f"student at {self.steps} NFE" if self.kind == "student" else f"{self.steps}-step teacher"

    @cached_property
    def prompts(self) -> list[str]:
        return [line["prompt"] for line in self.lines]

    @cached_property
    def seeds(self) -> list[int]:
        return [line["seed"] for line in self.lines]

    @property
    def files(self) -> list[Path]:
        return [self.path / line["file"] for line in self.lines]

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

    def image(self, place: int) -> Tensor:
        """(c, h, w) uint8."""
        return read_image(self.path / self.lines[place]["file"])

    def latent(self, place: int) -> Tensor | None:
        """(C, H, W) float32; None where the folder keeps none."""
        file = self.lines[place].get("latents")
        return None if file is None else read_latents(self.path / file)

    @cached_property
    def images_BCHW(self) -> Tensor:
        """All of them, uint8. Raises EvaluationError where they have several sizes."""
        return _stack(self.path, [self.image(place) for place in range(len(self))], "images")

    @cached_property
    def latents_BCHW(self) -> Tensor | None:
        """All of them, float32; None where the folder has none (latents=false). Raises EvaluationError where one is not finite."""
        if not all("latents" in line for line in self.lines):
            return None
        return _finite(self.path, [self.latent(place) for place in range(len(self))])


def open_samples(path: Path | str) -> SampleFolder:
    """Raises EvaluationError where the folder is not a finished one of tools/sample.py. Images and latents are not opened."""
    path = Path(path)
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder. Give a folder that tools/sample.py wrote.")
    inside = (
        sorted(str(found.parent) for found in path.glob("*/meta.json")) if not (path / "meta.json").exists() else []
    )
    if inside:
        raise EvaluationError(f"{path} holds several folders of samples. Name them: samples=[{','.join(inside)}].")
    meta = _read_meta(path / "meta.json")
    lines = read_jsonl(path / "manifest.jsonl", ("index", "seed", "prompt", "file"))
    lines.sort(key=lambda line: line["index"])  # with gaps where an image could not be made
    if len({line["index"] for line in lines}) != len(lines) or len(lines) != meta["images"]:
        raise EvaluationError(
            f"{path} does not hold one set of samples: {meta['images']} images in meta.json, {len(lines)} lines in "
            "manifest.jsonl, each with an index of its own. Sample it again."
        )
    missing = next((line["file"] for line in lines if not (path / line["file"]).is_file()), None)
    if missing is not None:
        raise EvaluationError(f"{path / missing} is missing, and the manifest lists it. Run tools/sample.py again.")
    return SampleFolder(path, meta, lines)


def load_samples(path: Path | str) -> SampleFolder:
    """The same with every image and latent read and checked: those of one size that fit into memory."""
    samples = open_samples(path)
    _ = samples.images_BCHW, samples.latents_BCHW
    return samples


def read_image(path: Path, remedy: str = "Delete it, and run tools/sample.py again.") -> Tensor:
    """(c, h, w) uint8, c = 1 or 3. Raises EvaluationError where it is no image."""
    try:
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture if picture.mode == "L" else picture.convert("RGB")))
    except FileNotFoundError as error:
        raise EvaluationError(f"{path} is missing. Run tools/sample.py again.") from error
    except (OSError, UnidentifiedImageError, SyntaxError) as error:  # PIL's answers to damaged files
        raise EvaluationError(f"{path} is damaged, or no image ({error}). {remedy}") from error
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


def pair_up(samples: SampleFolder, reference: SampleFolder) -> dict[int, int]:
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


def distinct_titles(folders: list[SampleFolder]) -> list[str]:
    """Of rows in one table: with the folder's name where titles alone are the same."""
    titles = [samples.long_title for samples in folders]
    return [
        f"{title} ({samples.name})" if titles.count(title) > 1 else title
        for title, samples in zip(titles, folders, strict=True)
    ]


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
        raise EvaluationError(f"{path}: images={meta['images']}, nothing was sampled. Sample again.")
    return meta
