"""Reading what tools/sample.py wrote, with every check that later code relies on.

B samples, C latent channels, H W latent size; images are (B, c, h, w) with their own size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
    latents_BCHW: Tensor
    """float32, finite."""
    prompts: list[str]
    seeds: list[int]
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

    Raises EvaluationError where a file is missing or damaged, where the files disagree on the number of samples, or
    where latents are not finite.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvaluationError(f"{path} is not a folder. Give a folder that tools/sample.py wrote.")
    meta = _read_meta(path / "meta.json")
    tensors = _read_tensors(path / "samples.safetensors")
    lines = sorted(read_jsonl(path / "manifest.jsonl", ("index", "seed", "prompt")), key=lambda line: line["index"])

    counts = {name: len(tensor) for name, tensor in tensors.items()} | {"manifest.jsonl": len(lines)}
    if len(set(counts.values())) != 1 or [line["index"] for line in lines] != list(range(len(lines))) or not lines:
        raise EvaluationError(f"{path} does not hold one set of samples, numbered from 0: {counts}. Sample it again.")
    finite_B = tensors["latents"].isfinite().flatten(1).all(dim=1)
    if not finite_B.all():
        bad = (~finite_B).nonzero().flatten().tolist()
        raise EvaluationError(
            f"{path}: {len(bad)} of {len(lines)} latents are not finite (first at index {bad[0]}). The sampler or its "
            "weights diverged; such samples cannot be measured."
        )
    return SampleFolder(
        path=path,
        images_BCHW=tensors["images"],
        latents_BCHW=tensors["latents"],
        prompts=[line["prompt"] for line in lines],
        seeds=[line["seed"] for line in lines],
        meta=meta,
    )


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
        mine, theirs = tuple(getattr(samples, what).shape[1:]), tuple(getattr(reference, what).shape[1:])
        if mine != theirs:
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise EvaluationError(f"{path} is missing: sampling was not finished. Run tools/sample.py again.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise EvaluationError(f"{path} is damaged ({error}). Sample it again.") from error
    for name, dtype in (("latents", torch.float32), ("images", torch.uint8)):
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].dim() != 4:
            raise EvaluationError(f"{path} has no {name} of four axes and type {dtype}.")
    return {name: tensors[name] for name in ("latents", "images")}
