"""The images of a request one by one: what each is made from, its files, and which of them are on disk and whole.

An image is a PNG, written under a temporary name and renamed; its latents are there before it is. So a folder that a kill left
holds whole images or none, and what is missing is seen from the names alone.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor

from piflow_dist.config import ConfigError, require
from piflow_dist.seeds import seed_from

PNG_END = b"IEND\xaeB`\x82"
COMPRESSION = 1
"""Of PNG: a photograph of 1024 x 1024 takes a fifth of the seconds of the usual level 6, and a sixth more bytes."""


@dataclass(frozen=True)
class ImageRequest:
    """One image. Its pixels depend on prompt, seed and size (and the request's weights and settings), not on the indices."""

    index: int
    prompt_index: int
    prompt: str
    seed: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.prompt_index:05d}_{self.seed}"

    @property
    def file(self) -> str:
        return f"images/{self.name}.png"

    @property
    def latents_file(self) -> str:
        return f"latents/{self.name}.safetensors"

    @property
    def noise_seed(self) -> int:
        return noise_seed(self.seed, self.prompt)

    def is_whole(self, out: Path, latents: bool) -> bool:
        return is_png(out / self.file) and (not latents or (out / self.latents_file).is_file())


def is_png(path: Path) -> bool:
    """A whole PNG, by its last bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # no such file, or shorter than that
        return False


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Lines of a text file as {"prompt": ...}, or of a .jsonl file as they are: prompt, seed or seeds, height and width."""
    require(path.is_file(), f"prompts={path} does not exist. Give a text file, one prompt a line, or .jsonl.")
    # Not splitlines(): a prompt may hold U+2028 and the like, which it takes for ends of lines.
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text().split("\n"), 1) if line.strip()]
    require(bool(lines), f"prompts={path} is empty. Write one prompt a line.")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in lines]
    return [parse_line(f"prompts={path}, line {number}", line) for number, line in lines]


def parse_line(where: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    require(
        isinstance(found, dict) and isinstance(found.get("prompt"), str),
        f'{where} should look like {{"prompt": "...", "seed": 1, "height": 1024, "width": 768}}, all but the prompt left out at will.',
    )
    known = {"prompt": str, "seed": int, "seeds": list, "height": int, "width": int}
    for key, value in found.items():
        require(key in known, f"{where} has {key}, which is not known. Known are {', '.join(known)}.")
        require(
            type(value) is known[key] and all(type(seed) is int for seed in (value if key == "seeds" else [])),
            f"{where}: {key}={value} is not of the type {known[key].__name__}{' of int' if key == 'seeds' else ''}.",
        )
    require(not {"seed", "seeds"} <= found.keys(), f"{where} has both seed and seeds. Give one of them.")
    return found


def list_images(lines: Iterable[dict[str, Any]], seeds: list[int], size: tuple[int, int]) -> list[ImageRequest]:
    """Every prompt with every seed. seeds and size (height, width): of lines that say nothing else."""
    images: list[ImageRequest] = []
    for prompt_index, line in enumerate(lines):
        own = line.get("seeds", [line["seed"]] if "seed" in line else seeds)
        require(
            len(set(own)) == len(own) > 0,
            f"prompt {prompt_index} has the seeds {own}: none, or one twice. Give distinct ones.",
        )
        require(min(own) >= 0, f"prompt {prompt_index} has the seed {min(own)}, which is negative.")
        height, width = line.get("height", size[0]), line.get("width", size[1])
        images += [
            ImageRequest(len(images) + i, prompt_index, line["prompt"], s, height, width) for i, s in enumerate(own)
        ]
    return images


def to_uint8(image_chw: Tensor) -> Tensor:
    return ((image_chw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_image(
    out: Path, image: ImageRequest, pixels_chw: Tensor, latents_CHW: Tensor | None, info: dict[str, Any]
) -> None:
    """pixels uint8; info becomes PNG metadata beside prompt and seed. Latents first: where the PNG is, they are."""
    if latents_CHW is not None:
        with replacing(out / image.latents_file) as temporary:
            save_file({"latents": latents_CHW.contiguous()}, temporary)
    metadata = PngInfo()
    for key, value in {"prompt": image.prompt, "seed": image.seed, "prompt_index": image.prompt_index, **info}.items():
        metadata.add_itxt(key, str(value))
    pixels = pixels_chw.permute(1, 2, 0).numpy()
    with replacing(out / image.file) as temporary:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
            temporary, "PNG", pnginfo=metadata, compress_level=COMPRESSION
        )


class replacing:  # noqa: N801 (read as a phrase)
    """A temporary path that takes the place of `path` where the block ends without an error."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def noise_seed(seed: int, prompt: str) -> int:
    """Of an image's own generator. The prompt is in it, or a set of images with one seed would share one noise."""
    return seed_from(seed, prompt)
