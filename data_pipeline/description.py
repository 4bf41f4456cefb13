"""dataset.json: what a prepared set holds and how it was made. Written by `prepare`, read by everything else.

A set on disk:
    <root>/dataset.json
    <root>/empty_prompt.safetensors             embedding of ""
    <root>/<split>/<bucket>/index.json          one bucket per latent size, named H x W, for example "8x8"
    <root>/<split>/<bucket>/shard.00000.mds.zstd
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store import download, is_remote, mirror_folder

FORMAT = 1
FILE_NAME = "dataset.json"
EMPTY_PROMPT = "empty_prompt.safetensors"
HASH = "xxh64"
"""Of every shard, compressed and not: checked when it is read."""


@dataclass(frozen=True)
class Shard:
    file: str
    """Relative to the bucket's folder, compressed."""
    bytes: int
    xxh64: str
    samples: int


@dataclass(frozen=True)
class Bucket:
    """The samples of one split that share one latent shape."""

    name: str
    samples: int
    latent_shape: tuple[int, int, int]
    """(C, H, W)"""
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    root: Path
    """Its folder; for a remote set the local folder that mirrors its dataset.json."""
    bucket_lists: Mapping[str, tuple[Bucket, ...]]
    """Per split."""
    codec: Mapping[str, Any]
    """For `load_codec`."""
    prompt_encoder: Mapping[str, Any]
    """For `load_prompt_encoder`."""
    prompt_dim: int
    """Width D of the prompt embeddings."""
    prompts: tuple[str, ...]
    """Every distinct caption, sorted; empty where there are more than a thousand."""
    source: Mapping[str, Any]
    request: Mapping[str, Any]
    """The settings of `prepare` that the content depends on."""
    created_by: Mapping[str, str]
    """Versions of the packages that wrote the set."""
    latents: str = "stored"
    """stored, online (training encodes the stored images) or none (prompts only: training starts from noise)."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Samples of the source that could not be used, by reason; one by one in left_out.jsonl."""
    changed: Mapping[str, int] = field(default_factory=dict)
    """Samples that had to be changed, by what was changed."""
    empty_prompt: str | None = None
    """sha256 of the file with the embedding of ""; None in sets of earlier versions, which have none."""
    pooled_dim: int | None = None
    """Width of the pooled prompt in an embedding's first row; None where there is none, and in sets of earlier versions."""
    remote: str | None = None
    """URL of a set in a remote store."""

    @property
    def splits(self) -> dict[str, int]:
        """Samples per split."""
        return {split: sum(bucket.samples for bucket in buckets) for split, buckets in self.bucket_lists.items()}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample. Raises ValueError where the set has buckets of several shapes."""
        shapes = {bucket.latent_shape for buckets in self.bucket_lists.values() for bucket in buckets}
        if len(shapes) != 1:
            raise ValueError(f"{self.root} has latents of several shapes: {sorted(shapes)}. Use one bucket.")
        return next(iter(shapes))

    @property
    def typical_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the bucket with most samples."""
        buckets = [bucket for buckets in self.bucket_lists.values() for bucket in buckets]
        return max(buckets, key=lambda bucket: bucket.samples).latent_shape

    @property
    def latent_channels(self) -> int:
        return next(bucket.latent_shape[0] for buckets in self.bucket_lists.values() for bucket in buckets)

    def buckets(self, split: str) -> tuple[Bucket, ...]:
        if split not in self.bucket_lists:
            raise ValueError(f"{self.root} has no split {split!r}. Its splits: {', '.join(self.bucket_lists)}.")
        return self.bucket_lists[split]

    @property
    def location(self) -> str:
        """Where its files are read from: a folder or a URL."""
        return self.remote or str(self.root)

    def folder(self, split: str, bucket: Bucket) -> Path:
        return self.root / split / bucket.name

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the content of all shards: two sets with one fingerprint hold the same bytes."""
        text = json.dumps(_splits_to_json(self.bucket_lists), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self) -> None:
        """Write <root>/dataset.json."""
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "source": dict(self.source),
            "codec": dict(self.codec),
            "prompt_encoder": dict(self.prompt_encoder),
            "prompt_dim": self.prompt_dim,
            "pooled_dim": self.pooled_dim,
            "prompts": list(self.prompts),
            "empty_prompt": self.empty_prompt,
            "latents": self.latents,
            "splits": _splits_to_json(self.bucket_lists),
            "left_out": dict(self.left_out),
            "changed": dict(self.changed),
            "request": dict(self.request),
            "created_by": dict(self.created_by),
        }
        (self.root / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")


def load_description(root: str | Path) -> DatasetDescription:
    """Read <root>/dataset.json; root is a folder or a URL such as s3://bucket/set.

    Raises FileNotFoundError where there is none, DataError where it cannot be read or is not of this format.
    """
    remote = str(root).rstrip("/") if is_remote(root) else None
    if remote is not None:
        root = mirror_folder(remote)
        download(f"{remote}/{FILE_NAME}", root / FILE_NAME)  # always: the set may have been replaced
    path = Path(root) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No data set in {root}: {path} is missing. Make one with tools/prepare_data.py, or give its place (docs/data.md)."
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Prepare the set again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise DataError(f"{path} has format {found!r}; this version reads format {FORMAT}. Prepare the set again.")
    try:
        description = DatasetDescription(
            root=Path(root).absolute(),
            bucket_lists={split: _buckets_from_json(buckets) for split, buckets in content["splits"].items()},
            codec=content["codec"],
            prompt_encoder=content["prompt_encoder"],
            prompt_dim=content["prompt_dim"],
            prompts=tuple(content["prompts"]),
            source=content["source"],
            request=content["request"],
            created_by=content["created_by"],
            latents=content.get("latents", "stored"),  # sets of earlier versions have stored ones
            left_out=content.get("left_out", {}),
            changed=content.get("changed", {}),
            empty_prompt=content.get("empty_prompt"),
            pooled_dim=content.get("pooled_dim"),
            remote=remote,
        )
        recorded = content["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}. Prepare the set again.") from error
    if description.fingerprint != recorded:
        raise DataError(f"{path} was edited: its list of shards does not match its fingerprint. Prepare the set again.")
    return description


def check_files(description: DatasetDescription) -> None:
    """Every file of the set is there with the size it was written with. (Hashes are checked when a shard is read.)"""
    if description.empty_prompt is not None and not (description.root / EMPTY_PROMPT).is_file():
        raise DataError(f"{description.root / EMPTY_PROMPT} is missing. Prepare the set again with overwrite=true.")
    for split, buckets in description.bucket_lists.items():
        for bucket in buckets:
            folder = description.folder(split, bucket)
            sizes = {folder / shard.file: shard.bytes for shard in bucket.shards} | {folder / "index.json": None}
            for path, size in sizes.items():
                if not path.is_file():
                    raise DataError(f"{path} is missing. Prepare the set again with overwrite=true.")
                if size is not None and path.stat().st_size != size:
                    raise DataError(
                        f"{path} has {path.stat().st_size} bytes, {FILE_NAME} says {size}. "
                        "Prepare the set again with overwrite=true."
                    )


def read_index(path: Path) -> tuple[Shard, ...]:
    """The shards that a bucket's index.json (mosaicml-streaming's own) lists. DataError where it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path} is missing. Restore it, or prepare the set again with overwrite=true.")
    try:
        return tuple(
            Shard(
                file=entry["zip_data"]["basename"],
                bytes=entry["zip_data"]["bytes"],
                xxh64=entry["zip_data"]["hashes"][HASH],
                samples=entry["samples"],
            )
            for entry in json.loads(path.read_text())["shards"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Prepare the set again with overwrite=true.") from error


def _splits_to_json(bucket_lists: Mapping[str, tuple[Bucket, ...]]) -> dict[str, Any]:
    return {split: [asdict(bucket) for bucket in buckets] for split, buckets in bucket_lists.items()}


def _buckets_from_json(buckets: list[dict[str, Any]]) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(
            name=bucket["name"],
            samples=bucket["samples"],
            latent_shape=tuple(bucket["latent_shape"]),
            shards=tuple(Shard(**shard) for shard in bucket["shards"]),
        )
        for bucket in buckets
    )
