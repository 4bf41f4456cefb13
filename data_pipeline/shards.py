"""Random access to the shards of one split, through mosaicml-streaming: hashes, decompression, cache, sample order.

StreamingDataset ties the processes of a machine together by shared memory with guessable names (000000_locals, ...) and
by collective calls in its constructor. That has three bad ends: a killed run's segments stay and stop the next one; two
runs that start together take the same name; ranks that do not all open the set wait for each other for ever. Here each
process opens the set as if it were alone, and the memory has no name: its workers inherit it, and the kernel frees it
with them, however they end. What processes do share is the folder of decompressed shards: `data_pipeline/cache.py`.
"""

import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from filelock import FileLock

from data_pipeline.cache import ShardCache, default_limit
from data_pipeline.compat import repair_torchvision
from data_pipeline.description import HASH, Bucket, DatasetDescription, read_index
from data_pipeline.errors import DataError
from data_pipeline.mds import read_shard_entries
from data_pipeline.store import default_cache, read_stored

repair_torchvision()

import streaming.base.dataset as streaming_dataset  # noqa: E402  (torchvision must be repaired first)
import streaming.base.shared.array as streaming_array  # noqa: E402
from streaming import Stream, StreamingDataset  # noqa: E402
from streaming.base.batching import generate_work  # noqa: E402
from streaming.base.world import World  # noqa: E402

SHUFFLE_BLOCK = 1 << 18
"""Samples travel at most about this far in a shuffle, so that an epoch of a large set needs few shards at a time."""
SHARDS_IN_CACHE = 4
"""A smaller cache would throw out what another process is about to read."""

logger = logging.getLogger(__name__)


class ShardSet(StreamingDataset):
    """The samples of one split, by number: `shards[i]` is the dict of sample i. See the module's docstring."""

    def __init__(
        self,
        description: DatasetDescription,
        split: str,
        *,
        seed: int = 0,
        shuffle: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        smallest_bucket: int = 1,
    ):
        """smallest_bucket: buckets of fewer samples are left out, with a warning."""
        buckets = [bucket for bucket in description.buckets(split) if bucket.samples >= smallest_bucket]
        for bucket in description.buckets(split):
            if bucket not in buckets:
                logger.warning(
                    "bucket %s of split %s of %s is left out: its %d samples do not fill a batch of %d",
                    *(bucket.name, split, description.location, bucket.samples, smallest_bucket),
                )
        self._root = description.location
        self._places = [f"{split}/{bucket.name}" for bucket in buckets]
        self._shapes = [bucket.latent_shape for bucket in buckets]
        self._cache, locals_ = _open_cache(description, self._places, cache_dir, cache_bytes)
        self._entries = []
        for bucket, place, local in zip(buckets, self._places, locals_, strict=True):
            self._entries += _fetch_index(description, bucket, place, local)
        largest = max(entry["raw_data"]["bytes"] for entry in self._entries)
        if self._cache.limit is not None and self._cache.limit < SHARDS_IN_CACHE * largest:
            raise ValueError(
                f"The cache {self._cache.folder} may hold {self._cache.limit / 2**30:.3g} GiB, fewer than "
                f"{SHARDS_IN_CACHE} shards of {largest / 2**30:.3g} GiB. Set a larger cache_gb, or a cache_dir with room."
            )
        with _standing_alone():
            super().__init__(
                streams=[
                    _stream(f"{self._root}/{place}", local) for place, local in zip(self._places, locals_, strict=True)
                ],
                validate_hash=HASH,
                batch_size=1,  # set per call of `epoch_order`
                shuffle=shuffle,
                # Streaming adds the epoch to the seed. Mixed first, else epoch 1 of seed 0 would be epoch 0 of seed 1.
                shuffle_seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
                shuffle_block_size=SHUFFLE_BLOCK,
                num_canonical_nodes=1,  # the order must not depend on how many machines read it
                batching_method="per_stream",
            )
        self._locals = locals_
        self._checked: set[int] = set()

    def epoch_order(self, epoch: int, global_batch: int) -> np.ndarray:
        """Sample numbers of one epoch, (steps, global_batch), the same on every rank and for every number of ranks.

        A row holds samples of one bucket only. What does not fill a row is left out.
        """
        self.batch_size = global_batch
        with _quiet("streaming.base.batching.per_stream"):  # it warns of the left-out rest in every epoch
            order = generate_work(self.batching_method, self, _OneProcess.detect(), epoch, 0)
        return order.reshape(-1, global_batch)

    def latent_shape(self, sample_id: int) -> tuple[int, int, int]:
        """(C, H, W) of the bucket that a sample is in."""
        shard_id, _ = self.spanner[sample_id]
        return self._shapes[self.stream_per_shard[shard_id]]

    def get_item(self, sample_id: int, retry: int = 50) -> Any:
        """retry: how often a shard may make room for another process's between its arrival and its reading."""
        shard_id, row = self.spanner[sample_id]
        try:
            if shard_id not in self._checked:
                self.prepare_shard(shard_id)
            sample = super().get_item(sample_id, retry)  # calls prepare_shard where the shard has left the cache
        except DataError as error:
            raise DataError(f"{error} (Wanted: row {row}.)") from error
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(f"{self._name(shard_id)}, row {row}: cannot be read ({error}).") from error
        self._cache.used(self._raw(shard_id))
        return sample

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        stream_id = self.stream_per_shard[shard_id]
        self._cache.bring(self._root, self._places[stream_id], self._entries[shard_id], self._locals[stream_id])
        self._checked.add(shard_id)

    def _name(self, shard_id: int) -> str:
        entry = self._entries[shard_id]
        stored = (entry["zip_data"] or entry["raw_data"])["basename"]
        return f"{self._root}/{self._places[self.stream_per_shard[shard_id]]}/{stored}"

    def _raw(self, shard_id: int) -> Path:
        return self._locals[self.stream_per_shard[shard_id]] / self._entries[shard_id]["raw_data"]["basename"]


def _open_cache(
    description: DatasetDescription, places: list[str], cache_dir: str | Path | None, cache_bytes: int | None
) -> tuple[ShardCache, list[Path]]:
    """The cache, and the folder of every bucket in it: beside the compressed shards where nothing speaks against it."""
    folders = [description.root / place for place in places]
    in_place = description.remote is None and cache_dir is None and cache_bytes is None
    if in_place and all(os.access(folder, os.W_OK) for folder in folders):
        return ShardCache(description.root, None), folders
    if cache_dir is None:
        cache_dir = default_cache()
        why = "remote" if description.remote else "read-only" if cache_bytes is None else "to be cached"
        logger.info("%s is %s: its shards are decompressed below %s (cache_dir)", description.location, why, cache_dir)
    folder = Path(cache_dir).absolute()
    if cache_bytes is None and description.remote is not None:
        cache_bytes = default_limit(folder)
    # The fingerprint keeps the copies of two sets apart, also when one has replaced the other at the same path.
    own = folder / description.fingerprint[:16]
    return ShardCache(folder, cache_bytes), [own / place for place in places]


def _stream(stored: str, local: Path) -> Stream:
    """For the index and the order: what is in the folder is the cache's affair. Streaming removes what it does not expect,
    which is the compressed shards where they are not in their own place."""
    if stored == str(local):
        return Stream(local=stored)
    return Stream(remote=stored, local=str(local), keep_zip=False)


def _fetch_index(description: DatasetDescription, bucket: Bucket, place: str, local: Path) -> list[dict[str, Any]]:
    """The shards of a bucket; its index.json is put into `local`. Raises DataError where it is not dataset.json's."""
    index = local / "index.json"
    if local != description.root / place or description.remote is not None:
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(local / ".index.lock"):
            content = read_stored(description.location, f"{place}/index.json", local / ".index.fetched")
            if not index.is_file() or index.read_bytes() != content:
                temporary = local / "index.json.new"  # a cache that makes room removes every .tmp
                temporary.write_bytes(content)
                os.replace(temporary, index)
    if read_index(index) != bucket.shards:
        raise DataError(
            f"{description.location}/{place}/index.json does not list the shards that dataset.json describes: files of "
            "two sets are mixed. Prepare the set again with overwrite=true."
        )
    return read_shard_entries(index)


class _NamelessMemory:
    """Stands in for streaming's SharedMemory: this process and those it forks see it, nobody else can."""

    def __init__(self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True):
        self.buf = memoryview(mmap.mmap(-1, size))


class _OneProcess(World):
    @classmethod
    def detect(cls) -> World:
        return World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)


_alone_lock = threading.Lock()


@contextmanager
def _standing_alone() -> Iterator[None]:
    """StreamingDataset's constructor sees one process in a world of one, and memory that needs no name."""
    replacements = [
        (streaming_dataset, "World", _OneProcess),
        (streaming_dataset, "dist", SimpleNamespace(is_available=lambda: False)),
        (streaming_dataset, "maybe_init_dist", lambda: False),
        (streaming_dataset, "get_shm_prefix", lambda local, remote, world: (0, _NamelessMemory(size=4))),
        (streaming_array, "SharedMemory", _NamelessMemory),
    ]
    with _alone_lock:
        originals = [getattr(module, name) for module, name, _ in replacements]
        try:
            for module, name, replacement in replacements:
                setattr(module, name, replacement)
            yield
        finally:
            for (module, name, _), original in zip(replacements, originals, strict=True):
                setattr(module, name, original)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    noisy = logging.getLogger(name)
    before = noisy.disabled
    noisy.disabled = True
    try:
        yield
    finally:
        noisy.disabled = before
