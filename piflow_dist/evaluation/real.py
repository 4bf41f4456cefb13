"""Real images and their statistics: computed once for a feature network, then kept as safetensors.

N real images  D features
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.description import FILE_NAME, load_description
from data_pipeline.scan import IMAGE_SUFFIXES
from data_pipeline.store import is_remote
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.networks import FeatureNetwork
from piflow_dist.evaluation.samples import EvaluationError, read_image
from piflow_dist.evaluation.shares import Share

CPU = torch.device("cpu")
FORMAT = "piflow_dist real statistics 1"
ROWS = 4096
"""Images whose features are on the device at a time, in float64."""
KEPT = 10_000
"""Images whose features are kept, evenly spaced: kernel distance and precision compare pairs of images."""


@dataclass(frozen=True)
class Moments:
    mean_D: Tensor
    """float64."""
    covariance_DD: Tensor
    """float64, of a sample (N - 1)."""
    count: int

    @classmethod
    def of(cls, features_ND: Tensor, device: torch.device, chosen_N: Tensor | None = None) -> "Moments":
        """Of all rows or of those chosen, in blocks on `device`, where the moments stay."""
        rows_N = torch.arange(len(features_ND)) if chosen_N is None else chosen_N
        D = features_ND.shape[1]
        near_D = features_ND[:ROWS].to(device).double().mean(dim=0)  # so that no large squares are subtracted
        sum_D = torch.zeros(D, dtype=torch.float64, device=device)
        products_DD = torch.zeros(D, D, dtype=torch.float64, device=device)
        for block in rows_N.split(ROWS):
            block_BD = features_ND[block].to(device).double() - near_D
            sum_D += block_BD.sum(dim=0)
            products_DD += block_BD.T @ block_BD
        count = len(rows_N)
        mean_D = sum_D / count
        return cls(near_D + mean_D, (products_DD - count * torch.outer(mean_D, mean_D)) / (count - 1), count)

    def to(self, device: torch.device) -> "Moments":
        return Moments(self.mean_D.to(device), self.covariance_DD.to(device), self.count)


@dataclass(frozen=True)
class RealStatistics:
    network: str
    """Fingerprint of the feature network."""
    title: str
    content: str
    """Fingerprint of the images."""
    moments: Moments
    features_ND: Tensor
    """float32, of at most KEPT images."""
    patch_moments: Moments | None

    def save(self, path: Path) -> None:
        tensors = {"mean": self.moments.mean_D, "covariance": self.moments.covariance_DD, "features": self.features_ND}
        if self.patch_moments is not None:
            tensors |= {"patch_mean": self.patch_moments.mean_D, "patch_covariance": self.patch_moments.covariance_DD}
        facts = {"network": self.network, "title": self.title, "content": self.content, "count": self.moments.count}
        facts["patch_count"] = self.patch_moments.count if self.patch_moments else 0
        # Evaluations on several nodes may share the cache.
        partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                partial,
                metadata={"format": FORMAT, "facts": json.dumps(facts)},
            )
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise EvaluationError(
                f"{path} cannot be written ({error}). Set cache=DIR, or another stats=FILE."
            ) from error

    @classmethod
    def load(cls, path: Path) -> "RealStatistics":
        """Raises EvaluationError where the file is no such statistics."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise EvaluationError(
                        f"{path} holds no statistics of real images. Make them with stats={path} real=IMAGES."
                    )
                facts: dict[str, Any] = json.loads(metadata["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(f"{path} is damaged ({error}). Make it again.") from error
        patch = None
        if facts["patch_count"]:
            patch = Moments(tensors["patch_mean"], tensors["patch_covariance"], facts["patch_count"])
        moments = Moments(tensors["mean"], tensors["covariance"], facts["count"])
        return cls(facts["network"], facts["title"], facts["content"], moments, tensors["features"], patch)


class RealImages(Protocol):
    title: str
    fingerprint: str
    """Of the images' content."""

    def __len__(self) -> int: ...

    def read(self, indices: range) -> list[Tensor]:
        """(c, h, w) uint8 each."""
        ...


class ImageFolder:
    """All image files below a folder, in the order of their names."""

    def __init__(self, folder: Path):
        self.title = str(folder)
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise EvaluationError(f"real={folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no {FILE_NAME}.")
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: range) -> list[Tensor]:
        return [read_image(self.paths[index], "Mend or remove it.") for index in indices]


class PreparedSet:
    """A split of a set that tools/prepare_data.py wrote: decoded from its latents (what a perfect model would sample), or
    its stored images, cropped to their bucket."""

    def __init__(self, root: str, split: str, device: torch.device):
        from data_pipeline.codec import load_codec
        from data_pipeline.shards import ShardSet

        description = load_description(root)
        self.title, self.kind = f"{root} ({split})", description.latents
        if self.kind == "none":
            raise EvaluationError(f"real={root} holds prompts only. Give a set with images.")
        self.shards = ShardSet(description, split)
        self.codec, self.device = load_codec(description.codec, device), device
        self.fingerprint = f"{description.fingerprint}/{split}"

    def __len__(self) -> int:
        return self.shards.size

    def read(self, indices: range) -> list[Tensor]:
        return [self._image(index) for index in indices]

    def _image(self, index: int) -> Tensor:
        row = self.shards[index]
        if self.kind == "online":
            _, H, W = self.shards.latent_shape(index)
            size = (W * self.codec.downscale, H * self.codec.downscale)
            return _cropped(row["image"], size, self.codec.image_channels, row["key"])
        latent_1CHW = torch.from_numpy(row["latents"].copy())[None].float().to(self.device)
        image_chw = self.codec.decode(latent_1CHW)[0]
        return ((image_chw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _cropped(encoded: bytes, size: tuple[int, int], channels: int, key: str) -> Tensor:
    import io

    import numpy as np

    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            upright = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(ImageOps.fit(upright, size, Image.Resampling.LANCZOS))
    except (OSError, UnidentifiedImageError) as error:
        raise EvaluationError(f"image {key} cannot be read ({error}). Prepare the set again.") from error
    tensor = torch.from_numpy(pixels.copy())
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.permute(2, 0, 1).contiguous()


def open_real(source: str, split: str, device: torch.device) -> RealImages:
    if is_remote(source) or (Path(source) / FILE_NAME).is_file():
        return PreparedSet(source, split, device)
    if not Path(source).is_dir():
        raise EvaluationError(
            f"real={source} is neither a prepared set, nor a folder of images, nor a .safetensors of statistics."
        )
    return ImageFolder(Path(source))


def real_statistics(
    source: str,
    split: str,
    network: FeatureNetwork,
    share: Share,
    batch_size: int,
    cache: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> RealStatistics:
    """From a file, from the cache, or computed by all ranks together and kept; the same on every rank.

    Raises NotMeasurable or EvaluationError, on every rank, where a file is of another network, or the images cannot be read.
    """
    if source.endswith(".safetensors"):
        found = RealStatistics.load(Path(source))
        if found.network != network.fingerprint:
            raise EvaluationError(
                f"real={source} was made with other weights of a feature network ({found.network[:12]}) than those of this "
                f"evaluation, {network.title} ({network.fingerprint[:12]}). Make it again with stats=."
            )
        return found
    images = share.attempt(lambda: open_real(source, split, share.device))
    key = hashlib.sha256(f"{images.fingerprint} {network.fingerprint}".encode()).hexdigest()[:16]
    path = cache / f"real_{key}.safetensors"
    if share.from_main(path.is_file()):
        return RealStatistics.load(path)
    batches = share.batches(len(images), batch_size)
    rows, patches = share.attempt(lambda: describe_batches(images, batches, network, progress))
    features_ND = share.gather(rows, len(images))
    patch_ND = share.gather(patches, len(images))
    patch_ND = patch_ND[~patch_ND.isnan().any(dim=1)] if patch_ND.numel() else patch_ND
    chosen = torch.linspace(0, len(features_ND) - 1, min(KEPT, len(features_ND))).round().long()
    statistics = RealStatistics(
        network.fingerprint,
        f"{images.title}, {len(images)} images",
        images.fingerprint,
        Moments.of(features_ND, share.device).to(CPU),
        features_ND[chosen],
        Moments.of(patch_ND, share.device).to(CPU) if len(patch_ND) > patch_ND.shape[1] > 0 else None,
    )
    share.attempt(lambda: statistics.save(path) if share.is_main else None)
    return statistics


def describe_batches(
    images: RealImages, batches: Iterable[range], network: FeatureNetwork, progress: Callable[[int], None]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Features and, of images that are large enough, features of the middle patch, by the image's number."""
    rows: dict[int, Tensor] = {}
    patches: dict[int, Tensor] = {}
    for indices in batches:
        try:
            features, patch = describe_all(network, images.read(indices))
        except NotMeasurable as reason:
            raise EvaluationError(f"real={images.title}: {reason}") from reason
        rows |= {index: features[place] for place, index in enumerate(indices)}
        patches |= {index: patch[place] for place, index in enumerate(indices) if patch[place] is not None}
        progress(len(indices))
    return rows, patches


def describe_all(network: FeatureNetwork, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(features, features of the middle patch or None) of images that may differ in size, size by size."""
    features: list[Any] = [None] * len(images)
    patches: list[Any] = [None] * len(images)
    for members in by_shape(images):
        batch_Bchw = torch.stack([images[index] for index in members])
        described, patch = network.describe(batch_Bchw)[0], network.describe_patch(batch_Bchw)
        for place, index in enumerate(members):
            features[index] = described[place]
            patches[index] = None if patch is None else patch[place]
    return features, patches


def by_shape(images: list[Tensor]) -> list[list[int]]:
    """Indices of images of one size, in the order in which sizes first appear."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(index)
    return list(groups.values())
