"""Looking at finished sets: list, verify, count, show, merge. Reads shards once through, in memory."""

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_pipeline.codec import load_codec
from data_pipeline.description import (
    EMPTY_PROMPT,
    FILE_NAME,
    Bucket,
    DatasetDescription,
    check_files,
    load_description,
    read_index,
)
from data_pipeline.empty_prompt import read_empty_prompt
from data_pipeline.errors import DataError
from data_pipeline.mds import decode_row, read_shard, read_shard_entries, stored_file
from data_pipeline.parts import LEFT_OUT
from data_pipeline.staging import publish, staging_folder
from data_pipeline.writing import from_bfloat16_bits

Advance = Callable[[int], None]


def find_sets(folder: Path) -> list[DatasetDescription]:
    """The set in `folder`, or those below it. Raises FileNotFoundError where there is none."""
    places = [folder] if (folder / FILE_NAME).is_file() else sorted(path.parent for path in folder.rglob(FILE_NAME))
    if not places:
        raise FileNotFoundError(f"No data set in or below {folder} ({FILE_NAME} is missing).")
    return [load_description(place) for place in places]


def list_line(description: DatasetDescription) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in description.splits.items())
    names = {bucket.name for buckets in description.bucket_lists.values() for bucket in buckets}
    buckets = f"{len(names)} buckets" if len(names) > 1 else f"bucket {next(iter(names))}"
    return (
        f"{description.root}: {splits}; {buckets}; latents {description.latents}; {description.codec['kind']}, "
        f"{description.prompt_encoder['kind']}; {stored_bytes(description) / 2**30:.2f} GiB"
    )


def stored_bytes(description: DatasetDescription) -> int:
    return sum(
        shard.bytes for buckets in description.bucket_lists.values() for bucket in buckets for shard in bucket.shards
    )


def rows(
    description: DatasetDescription, split: str, bucket: Bucket, on_damage: Callable[[str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """All rows of a bucket. With `on_damage`, what cannot be read is told there, by shard and row, and passed over."""
    folder = description.folder(split, bucket)
    for entry in read_shard_entries(folder / "index.json"):
        path = stored_file(folder, entry)
        try:
            shard = read_shard(path, entry)
        except DataError as error:
            if on_damage is None:
                raise
            on_damage(str(error))
            continue
        for row in range(entry["samples"]):
            try:
                yield decode_row(shard, row, entry)
            except ValueError as error:
                if on_damage is None:
                    raise DataError(f"{path}, row {row}: {error}.") from error
                on_damage(f"{path}, row {row}: {error}.")


def verify(description: DatasetDescription, advance: Advance = lambda count: None) -> list[str]:
    """Everything that is wrong with a set, by shard and row: files, hashes, shapes, numbers, keys. Empty: it is whole."""
    problems: list[str] = []
    keys: set[int] = set()
    try:
        check_files(description)
        if description.empty_prompt is not None:
            read_empty_prompt(description)
    except DataError as error:
        problems.append(str(error))
    for split, buckets in description.bucket_lists.items():
        for bucket in buckets:
            index = description.folder(split, bucket) / "index.json"
            try:
                if read_index(index) != bucket.shards:
                    problems.append(f"{index} does not list the shards that {FILE_NAME} describes.")
                for row in rows(description, split, bucket, problems.append):
                    problems += [
                        f"{index.parent}, sample {row['key']}: {what}" for what in _row_faults(row, description, bucket)
                    ]
                    number = hash(row["key"])
                    if number in keys:
                        problems.append(f"{index.parent}: key {row['key']} comes twice.")
                    keys.add(number)
                    advance(1)
            except DataError as error:
                problems.append(str(error))
    return list(dict.fromkeys(problems))


def _row_faults(row: dict[str, Any], description: DatasetDescription, bucket: Bucket) -> Iterator[str]:
    if description.latents == "stored":
        if row["latents"].shape != bucket.latent_shape:
            yield f"latents of shape {row['latents'].shape}, the bucket's is {bucket.latent_shape}."
        elif not np.isfinite(row["latents"]).all():
            yield "latents that are not finite."
    elif description.latents == "online" and not row["image"]:
        yield "no image."
    embeds_LD = from_bfloat16_bits(row["prompt_embeds"])
    if embeds_LD.ndim != 2 or embeds_LD.shape[1] != description.prompt_dim or not len(embeds_LD):
        yield f"prompt embeddings of shape {tuple(embeds_LD.shape)}, their width is {description.prompt_dim}."
    elif not embeds_LD.float().isfinite().all():
        yield "prompt embeddings that are not finite."


@dataclass
class Statistics:
    tokens: list[int]
    caption_characters: list[int]
    latent_mean: float | None
    latent_std: float | None

    def lines(self, description: DatasetDescription) -> Iterator[str]:
        for split, buckets in description.bucket_lists.items():
            total = description.splits[split]
            for bucket in buckets:
                size = sum(shard.bytes for shard in bucket.shards)
                yield (
                    f"{split} {bucket.name}: {bucket.samples:,} samples ({100 * bucket.samples / total:.1f} %), "
                    f"{len(bucket.shards)} shards, {size / bucket.samples / 1024:.1f} KiB a sample"
                )
        for name, values in (("tokens", self.tokens), ("caption characters", self.caption_characters)):
            low, middle, high = np.percentile(values, [0, 50, 100])
            yield f"{name}: {low:.0f} to {high:.0f}, median {middle:.0f} (of {len(values):,} samples read)"
        if self.latent_std is not None:
            yield f"latents: mean {self.latent_mean:.4f}, standard deviation {self.latent_std:.4f}"
        for what, counts in (("left out", description.left_out), ("changed", description.changed)):
            for reason, count in counts.items():
                yield f"{what}: {count:,} ({reason})"


def measure(description: DatasetDescription, most: int = 2000) -> Statistics:
    """From the first shards of every bucket, about `most` samples in all."""
    lists = [(split, bucket) for split, buckets in description.bucket_lists.items() for bucket in buckets]
    tokens, characters, count, total, squares = [], [], 0, 0.0, 0.0
    for split, bucket in lists:
        for _, row in zip(range(max(1, most // len(lists))), rows(description, split, bucket), strict=False):
            tokens.append(len(row["prompt_embeds"]))
            characters.append(len(row["prompt"]))
            if description.latents == "stored":
                values = row["latents"].astype(np.float64)
                count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
    if not count:
        return Statistics(tokens, characters, None, None)
    mean = total / count
    return Statistics(tokens, characters, float(mean), float((squares / count - mean**2) ** 0.5))


CELL, TEXT, LINE = 192, 44, 14


def contact_sheet(description: DatasetDescription, split: str, count: int, device: str = "cpu") -> Image.Image:
    """The first samples of every bucket in turn, decoded from their latents (or their stored images), with captions."""
    if description.latents == "none":
        raise DataError(f"{description.root} holds prompts only: there is nothing to show.")
    buckets = description.buckets(split)
    each = -(-count // len(buckets))
    samples = []
    for bucket in buckets:
        samples += [row for _, row in zip(range(each), rows(description, split, bucket), strict=False)]
    samples = samples[:count]
    columns = max(1, round(len(samples) ** 0.5 * 1.3))
    lines = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * CELL, lines * (CELL + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    codec = load_codec(description.codec, device)
    for number, row in enumerate(samples):
        left, top = number % columns * CELL, number // columns * (CELL + TEXT)
        picture = _picture(row, codec, description.latents, device)
        scale = (CELL - 8) / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        for i, line in enumerate(textwrap.wrap(row["prompt"], 30)[:3]):
            # Pillow's built-in font has no more than Latin-1.
            draw.text(
                (left + 4, top + CELL + i * LINE), line.encode("latin-1", "replace").decode("latin-1"), fill="black"
            )
    return sheet


def _picture(row: dict[str, Any], codec: Any, latents: str, device: str) -> Image.Image:
    if latents == "online":
        from data_pipeline.decode import Decoder

        (pixels_hwc,) = Decoder(codec.image_channels).decode([row["image"]], [row["key"]])
    else:
        decoded_1chw = codec.decode(torch.from_numpy(row["latents"].copy())[None].float().to(device))
        pixels_hwc = ((decoded_1chw[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels_hwc.squeeze(2) if pixels_hwc.shape[2] == 1 else pixels_hwc).convert("RGB")


def merge(out: Path, sets: list[DatasetDescription]) -> DatasetDescription:
    """One set of the shards of several, in the order given. Files are linked where the disk allows it, else copied.

    Raises DataError where the sets do not fit together, ValueError where `out` exists.
    """
    first = sets[0]
    for other in sets[1:]:
        for name in ("codec", "prompt_encoder", "latents"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise DataError(
                    f"{first.root} and {other.root} differ in {name}: {mine} and {theirs}. Prepare one with like=THE_OTHER."
                )
    _refuse_double(sets)
    if out.exists():
        raise ValueError(f"out={out} exists. Choose another folder.")
    with staging_folder(out) as staged:
        bucket_lists: dict[str, tuple[Bucket, ...]] = {}
        for split in dict.fromkeys(split for one in sets for split in one.bucket_lists):
            names = sorted({bucket.name for one in sets for bucket in one.bucket_lists.get(split, ())})
            bucket_lists[split] = tuple(_merge_bucket(staged, sets, split, name) for name in names)
        prompts = sorted({prompt for one in sets for prompt in one.prompts}) if all(one.prompts for one in sets) else []
        replace(
            first,
            root=staged,
            bucket_lists=bucket_lists,
            prompts=tuple(prompts) if len(prompts) <= 1000 else (),
            source={"name": "merged", "sets": [{"fingerprint": one.fingerprint, **one.source} for one in sets]},
            request={"merged": [str(one.root) for one in sets]},
            left_out=_sum_counts([one.left_out for one in sets]),
            changed=_sum_counts([one.changed for one in sets]),
        ).write()
        if first.empty_prompt is not None:
            shutil.copyfile(first.root / EMPTY_PROMPT, staged / EMPTY_PROMPT)
        with (staged / LEFT_OUT).open("w") as lines:
            for one in sets:
                if (one.root / LEFT_OUT).is_file():
                    lines.write((one.root / LEFT_OUT).read_text())
        publish(staged, out)
    return load_description(out)


def _refuse_double(sets: list[DatasetDescription]) -> None:
    seen: dict[str, Path] = {}
    for one in sets:
        for buckets in one.bucket_lists.values():
            for shard in (shard for bucket in buckets for shard in bucket.shards):
                if shard.xxh64 in seen:
                    raise DataError(
                        f"{seen[shard.xxh64]} and {one.root} share a shard ({shard.file}): samples would come twice."
                    )
        seen |= {
            shard.xxh64: one.root
            for buckets in one.bucket_lists.values()
            for bucket in buckets
            for shard in bucket.shards
        }


def _merge_bucket(staged: Path, sets: list[DatasetDescription], split: str, name: str) -> Bucket:
    target, entries, shape = staged / split / name, [], None
    target.mkdir(parents=True)
    for one in sets:
        for bucket in one.bucket_lists.get(split, ()):
            if bucket.name != name:
                continue
            shape, folder = bucket.latent_shape, one.folder(split, bucket)
            for entry in read_shard_entries(folder / "index.json"):
                source = stored_file(folder, entry)
                entry["raw_data"]["basename"] = f"shard.{len(entries):05d}.mds"
                entry["zip_data"]["basename"] = f"shard.{len(entries):05d}.mds.zstd"
                try:
                    os.link(source, target / entry["zip_data"]["basename"])
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, target / entry["zip_data"]["basename"])
                entries.append(entry)
    (target / "index.json").write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))
    shards = read_index(target / "index.json")
    return Bucket(name, sum(shard.samples for shard in shards), shape, shards)


def _sum_counts(counts: list[Any]) -> dict[str, int]:
    names = sorted({name for one in counts for name in one})
    return {name: sum(one.get(name, 0) for one in counts) for name in names}
