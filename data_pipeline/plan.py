"""A preparation cut into parts that any number of processes work off: what is in which part depends on the source alone.

Beside the set to be made:
    .<name>.parts/plan.json             settings, digest of the items, what all parts share; written last
    .<name>.parts/plan/train-00000.jsonl    the items of a part
    .<name>.parts/done/train-00000/     a finished part; `data_pipeline/parts.py`
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.items import Item, read_items, write_items
from data_pipeline.prepare_settings import PrepareConfig
from data_pipeline.scan import scan

POLL_SECONDS = 1.0
OpenItems = Callable[[], Iterator[Item]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    name: str
    """Split and number: "train-00012"."""
    split: str
    items: int


@dataclass(frozen=True)
class Plan:
    folder: Path
    parts: tuple[Part, ...]
    digest: str
    """sha256 over all items."""
    shared: dict[str, Any]
    """Codec and prompt encoder as they describe themselves: equal for all parts."""

    @property
    def total(self) -> int:
        return sum(part.items for part in self.parts)

    def items(self, part: Part) -> Iterator[Item]:
        return read_items(self.folder / "plan" / f"{part.name}.jsonl")

    def done_folder(self, part: Part) -> Path:
        return self.folder / "done" / part.name

    def unfinished(self) -> list[Part]:
        done = {path.name for path in (self.folder / "done").iterdir()}
        return [part for part in self.parts if part.name not in done]


def make_plan(config: PrepareConfig, describe_shared: Callable[[OpenItems], dict[str, Any]]) -> Plan:
    """Scan the source and write the plan, or find that an earlier call's plan is the same. One process calls this.

    describe_shared: called with a function that opens all items once more; returns what goes into `Plan.shared`.
    Raises DataError where an unfinished preparation began with other settings or another source.
    """
    folder = config.work_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done").mkdir(exist_ok=True)
    for stale in folder.glob("plan.new-*"):
        shutil.rmtree(stale)
    fresh = folder / f"plan.new-{os.getpid()}"
    fresh.mkdir()
    parts, digest = _write_parts(config, fresh)
    if not parts:
        shutil.rmtree(folder)
        raise DataError(f"path={config.path} has no samples for source={config.source}.")
    known = _read_plan(folder)
    if known is not None:
        shutil.rmtree(fresh)
        _refuse_another(config, known, digest)
        return known[0]
    shutil.rmtree(folder / "plan", ignore_errors=True)  # of a call that was killed before its plan.json
    fresh.rename(folder / "plan")
    plan = Plan(folder, parts, digest, {})
    shared = describe_shared(lambda: itertools.chain.from_iterable(plan.items(part) for part in parts))
    content = {
        "request": config.request(),
        "digest": digest,
        "shared": shared,
        "parts": [asdict(part) for part in parts],
    }
    temporary = folder / "plan.json.tmp"
    temporary.write_text(json.dumps(content))
    temporary.rename(folder / "plan.json")
    return Plan(folder, parts, digest, shared)


def wait_for_plan(config: PrepareConfig, rank: int, finished: Callable[[], object]) -> Plan | None:
    """The plan that rank 0 writes; None where the set is finished meanwhile. Raises ValueError for other settings."""
    told = time.monotonic()
    while (known := _read_plan(config.work_folder)) is None:
        if finished() is not None:
            return None
        time.sleep(POLL_SECONDS)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            logger.info("rank %d waits for rank 0 to list the samples in %s", rank, config.path)
    _refuse_another(config, known, known[0].digest)
    return known[0]


def _refuse_another(config: PrepareConfig, known: tuple[Plan, dict[str, Any]], digest: str) -> None:
    plan, request = known
    if differing := config.differences(request):
        raise ValueError(
            f"An unfinished preparation of {config.out} was begun with {', '.join(differing)}. Finish it with those "
            f"settings, or remove {plan.folder}."
        )
    if plan.digest != digest:
        raise DataError(
            f"path={config.path} has changed since the preparation of {config.out} began ({plan.total:,} samples then). "
            f"Restore it, or remove {plan.folder} to begin anew."
        )


def _read_plan(folder: Path) -> tuple[Plan, dict[str, Any]] | None:
    path = folder / "plan.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        parts = tuple(Part(**part) for part in content["parts"])
        return Plan(folder, parts, content["digest"], content["shared"]), content["request"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). Remove {folder} to begin anew.") from error


def _write_parts(config: PrepareConfig, folder: Path) -> tuple[tuple[Part, ...], str]:
    """Items in the source's order, per split, in files of `samples_per_part`."""
    image_root = Path(config.image_root) if config.image_root else None
    columns = config.image_column, config.caption_column
    items = scan(config.source, Path(config.path), image_root, *columns, config.captions)
    waiting: dict[str, list[Item]] = {"train": [], "test": []}
    counts = dict.fromkeys(waiting, 0)
    parts: list[Part] = []
    hash_of_all = hashlib.sha256()
    keys: set[int] = set()

    def flush(split: str) -> None:
        part = Part(f"{split}-{counts[split]:05d}", split, len(waiting[split]))
        path = folder / f"{part.name}.jsonl"
        write_items(path, waiting[split])
        hash_of_all.update(path.read_bytes())
        parts.append(part)
        counts[split] += 1
        waiting[split] = []

    for item in items:
        number = int.from_bytes(hashlib.blake2b(item.key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
        if number in keys:
            raise DataError(f"Two samples of {config.path} have the key {item.key!r}.")
        keys.add(number)
        split = "test" if number / 2**64 < config.test_share else "train"
        waiting[split].append(item)
        if len(waiting[split]) == config.samples_per_part:
            flush(split)
    for split, rest in waiting.items():
        if rest:
            flush(split)
    return tuple(sorted(parts, key=lambda part: (part.split != "train", part.name))), hash_of_all.hexdigest()
