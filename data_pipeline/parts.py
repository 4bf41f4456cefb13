"""Working off the parts of a plan, and putting finished parts together to a set.

B batch  C latent channels  H W latent size  c image channels  h w image size

A part is finished when its folder is renamed to its name below done/; a killed process leaves nothing but a folder
under work/ that nobody reads. Parts do not share a shard, so that whoever makes them, the set has the same bytes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.buckets import Size, crop_box, make_buckets, nearest_bucket
from data_pipeline.codec import Codec, posterior_noise
from data_pipeline.decode import CropDecoder
from data_pipeline.description import Bucket, read_index
from data_pipeline.errors import DataError
from data_pipeline.items import Item
from data_pipeline.plan import Part, Plan
from data_pipeline.prepare_settings import PrepareConfig
from data_pipeline.prompts import PromptEncoder
from data_pipeline.reading import ReadSample, SampleReader
from data_pipeline.screen import Unusable
from data_pipeline.staging import sync_tree
from data_pipeline.token_limit import CUT
from data_pipeline.writing import SplitWriter, in_batches

REPORT = "report.json"
LEFT_OUT = "left_out.jsonl"
MOST_LISTED_PROMPTS = 1000
PIXELS_AT_ONCE = 64 << 20
"""Decoded at a time: 64 images of 1024 x 1024."""


@dataclass
class Workshop:
    """What a process needs to turn items into rows, opened once for all its parts."""

    config: PrepareConfig
    reader: SampleReader
    codec: Codec
    prompt_encoder: PromptEncoder
    device: str
    decoder: CropDecoder | None
    buckets: tuple[Size, ...]
    """Empty in sets of prompts only."""
    prompt_shape: tuple[int, int, int] | None
    """(C, H, W) that training from noise gives the images of a set of prompts only."""

    @classmethod
    def open(
        cls,
        config: PrepareConfig,
        codec: Codec,
        prompt_encoder: PromptEncoder,
        device: str,
        prompt_shape: tuple[int, int, int] | None = None,
    ) -> "Workshop":
        buckets, decoder = (), None
        if config.has_images():
            check_step(config, codec)
            buckets = make_buckets(config.resolution, config.bucket_step, config.max_aspect)
            at_once = min(config.batch_size, max(1, PIXELS_AT_ONCE // config.resolution**2))
            gpu = int(device.partition(":")[2] or 0)
            decoder = CropDecoder(
                codec.image_channels,
                device=config.decode_device,
                batch_size=at_once,
                threads=config.threads,
                device_id=gpu,
            )
        reader = SampleReader(config.limits(), config.image_column, config.caption_column)
        return cls(config, reader, codec, prompt_encoder, device, decoder, buckets, prompt_shape)

    def encode(self, group: list[ReadSample], bucket: Size) -> tuple[list[ReadSample], torch.Tensor, dict[int, str]]:
        """(samples that decode, their latents (B,C,H,W) float32 on the CPU, and by place why the others do not)."""
        boxes = [crop_box(sample.size, bucket) for sample in group]
        pixels_Bhwc, faults = self.decoder.crop(
            [sample.encoded for sample in group], [sample.size for sample in group], boxes, bucket
        )
        whole = [sample for i, sample in enumerate(group) if i not in faults]
        if not whole:
            return [], torch.empty(0), faults
        drawn = self.config.posterior == "sample"
        noise_BCHW = posterior_noise([s.key for s in whole], self.latent_shape(bucket)) if drawn else None
        return whole, self.codec.encode(to_images(pixels_Bhwc, self.device), noise_BCHW).cpu(), faults

    def latent_shape(self, bucket: Size) -> tuple[int, int, int]:
        n = self.codec.downscale
        return self.codec.latent_channels, bucket[0] // n, bucket[1] // n


def check_step(config: PrepareConfig, codec: Codec) -> None:
    # The transformer sees 2 x 2 patches of the latent.
    if config.bucket_step % (2 * codec.downscale):
        raise ValueError(
            f"bucket_step={config.bucket_step} is not a multiple of {2 * codec.downscale} (two latent pixels of the "
            f"codec). Use bucket_step={max(1, config.bucket_step // (2 * codec.downscale)) * 2 * codec.downscale}."
        )


def to_images(pixels_Bhwc: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """uint8 -> (B,c,h,w) float32 in [-1, 1]."""
    return pixels_Bhwc.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class PartReport:
    """What became of a part's items."""

    def __init__(self) -> None:
        self.left_out: list[tuple[str, str, str]] = []
        self.changed: Counter[str] = Counter()
        self.captions: set[str] = set()
        self._content = hashlib.sha256()

    def drop(self, key: str, reason: str, detail: str) -> None:
        self.left_out.append((key, reason, detail))

    def keep(self, sample: ReadSample, cut: str) -> None:
        self.changed.update([*sample.notes, *([CUT] if cut else [])])
        if len(self.captions) <= MOST_LISTED_PROMPTS:
            self.captions.add(sample.caption)
        for content in (sample.key.encode("utf-8", "surrogateescape"), sample.caption.encode(), sample.encoded):
            self._content.update(hashlib.sha256(content).digest())

    def write(self, folder: Path, buckets: tuple[Bucket, ...]) -> None:
        content = {
            "buckets": [asdict(bucket) for bucket in buckets],
            "left_out": dict(sorted(Counter(reason for _, reason, _ in self.left_out).items())),
            "changed": dict(sorted(self.changed.items())),
            "captions": sorted(self.captions),
            "content": self._content.hexdigest(),
        }
        with (folder / LEFT_OUT).open("w") as lines:
            for key, reason, detail in sorted(self.left_out):
                lines.write(json.dumps({"key": key, "reason": reason, "detail": detail}) + "\n")
        (folder / REPORT).write_text(json.dumps(content))


def work_off(plan: Plan, part: Part, shop: Workshop, advance: Callable[[int], None]) -> None:
    """Make a part and rename it into place. Another process that was faster is no error: both have made the same."""
    folder = plan.folder / "work" / f"{part.name}-{os.uname().nodename}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _make_part(folder, plan.items(part), shop, advance)
        sync_tree(folder)
        try:
            folder.rename(plan.done_folder(part))
        except OSError:
            if not plan.done_folder(part).is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_part(folder: Path, items: Iterable[Item], shop: Workshop, advance: Callable[[int], None]) -> None:
    config, report = shop.config, PartReport()
    writer = SplitWriter(folder, shop.prompt_encoder, config.shard_mb << 20, config.keep_images and config.has_images())
    at_once = shop.decoder.batch_size if shop.decoder else config.batch_size
    waiting: dict[Size, list[ReadSample]] = {}

    def left_out(key: str, reason: str, detail: str) -> None:
        if config.broken == "stop":
            raise DataError(f"Sample {key}: {reason} ({detail}). Repair or remove it, or set broken=drop.")
        report.drop(key, reason, detail)

    def write_images(bucket: Size) -> None:
        group = waiting.pop(bucket)
        whole, latents_BCHW, faults = shop.encode(group, bucket)
        for place, detail in faults.items():
            left_out(group[place].key, "damaged image", detail)
        if not whole:
            return
        if config.latents == "stored":
            writer.write(whole, latents_BCHW)
        else:
            writer.write_without_latents(whole, shop.latent_shape(bucket))
        for sample in whole:
            report.keep(sample, shop.prompt_encoder.cut(sample.caption))

    with ThreadPoolExecutor(config.threads) as pool:
        for batch in in_batches(items, at_once):
            samples = []
            for item, read in zip(batch, pool.map(shop.reader.read, batch), strict=True):
                if isinstance(read, Unusable):
                    left_out(item.key, read.reason, str(read))
                else:
                    samples.append(read)
            if not config.has_images():
                writer.write_without_latents(samples, shop.prompt_shape)
                for sample in samples:
                    report.keep(sample, shop.prompt_encoder.cut(sample.caption))
            for sample in samples if config.has_images() else ():
                bucket = nearest_bucket(sample.size, shop.buckets)
                waiting.setdefault(bucket, []).append(sample)
                if len(waiting[bucket]) == at_once:
                    write_images(bucket)
            advance(len(batch))
        for bucket in sorted(waiting):
            write_images(bucket)
    report.write(folder, writer.finish())


@dataclass(frozen=True)
class Assembled:
    bucket_lists: dict[str, tuple[Bucket, ...]]
    left_out: dict[str, int]
    changed: dict[str, int]
    prompts: tuple[str, ...]
    content: str
    """sha256 over what all samples were made from."""


def assemble(plan: Plan, folder: Path) -> Assembled:
    """Move the shards of all finished parts below `folder`, numbered in the order of the plan, one index per bucket.

    May be called again where an earlier call was killed: shards that have been moved are found in their place.
    """
    folder.mkdir(exist_ok=True)
    entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    shapes: dict[tuple[str, str], tuple[int, int, int]] = {}
    left_out, changed, captions, content = Counter(), Counter(), set(), hashlib.sha256()
    with (folder / LEFT_OUT).open("w") as lines:
        for part in plan.parts:
            done = plan.done_folder(part)
            report = json.loads((done / REPORT).read_text())
            left_out.update(report["left_out"])
            changed.update(report["changed"])
            captions |= set(report["captions"]) if len(captions) <= MOST_LISTED_PROMPTS else set()
            content.update(report["content"].encode())
            lines.write((done / LEFT_OUT).read_text())
            for bucket in report["buckets"]:
                place = part.split, bucket["name"]
                shapes[place] = tuple(bucket["latent_shape"])
                target = folder / part.split / bucket["name"]
                target.mkdir(parents=True, exist_ok=True)
                for entry in json.loads((done / bucket["name"] / "index.json").read_text())["shards"]:
                    of_bucket = entries.setdefault(place, [])
                    _move_shard(done / bucket["name"], target, entry, len(of_bucket))
                    of_bucket.append(entry)
    bucket_lists: dict[str, tuple[Bucket, ...]] = {split: () for split in ("train", "test")}
    for (split, name), shards in sorted(entries.items()):
        index = folder / split / name / "index.json"
        index.write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        described = read_index(index)
        samples = sum(shard.samples for shard in described)
        bucket_lists[split] += (Bucket(name, samples, shapes[split, name], described),)
    bucket_lists = {split: buckets for split, buckets in bucket_lists.items() if buckets}
    prompts = tuple(sorted(captions)) if len(captions) <= MOST_LISTED_PROMPTS else ()
    return Assembled(
        bucket_lists, dict(sorted(left_out.items())), dict(sorted(changed.items())), prompts, content.hexdigest()
    )


def _move_shard(source: Path, target: Path, entry: dict[str, Any], number: int) -> None:
    """Rename one shard's file, and in its index entry, to its number in the whole set."""
    before = entry["zip_data"]["basename"]
    entry["raw_data"]["basename"] = f"shard.{number:05d}.mds"
    entry["zip_data"]["basename"] = after = f"shard.{number:05d}.mds.zstd"
    if not (target / after).exists():
        (source / before).rename(target / after)
