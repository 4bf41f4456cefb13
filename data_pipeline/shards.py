"""Random access to the shards of one split, through mosaicml-streaming: hashes, decompression, cache, sample order.

StreamingDataset ties the processes of a machine together by shared memory with guessable names (000000_locals, ...) and
by collective calls in its constructor. That has three bad ends: a killed run's segments stay and stop the next one; two
runs that start together take the same name; ranks that do not all open the set wait for each other for ever. Here each
process opens the set as if it were alone, and the memory has no name: its workers inherit it, and the kernel frees it
with them, however they end. What processes do share is the folder of decompressed shards, and a lock file guards that.
"""

import logging
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from filelock import FileLock

from data_pipeline.compat import repair_torchvision
from data_pipeline.description import HASH, DatasetDescription, read_index
from data_pipeline.errors import DataError

repair_torchvision()

import streaming.base.dataset as streaming_dataset  # noqa: E402  (torchvision must be repaired first)
import streaming.base.shared.array as streaming_array  # noqa: E402
from streaming import Stream, StreamingDataset  # noqa: E402
from streaming.base.batching import generate_work  # noqa: E402
from streaming.base.hashing import get_hash  # noqa: E402
from streaming.base.world import World  # noqa: E402

SHUFFLE_BLOCK = 1 << 18
"""Samples travel at most about this far in a shuffle, so that an epoch of a large set needs few shards at a time."""

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
    ):
        buckets = description.buckets(split)
        self._sources = [description.folder(split, bucket) for bucket in buckets]
        for folder, bucket in zip(self._sources, buckets, strict=True):
            if read_index(folder / "index.json") != bucket.shards:
                raise DataError(
                    f"{folder}/index.json does not list the shards that dataset.json describes: files of two sets are "
                    "mixed. Prepare the set again with overwrite=true."
                )
        streams = [_open_stream(description, folder, cache_dir) for folder in self._sources]
        with _standing_alone(), _locked(streams):
            super().__init__(
                streams=streams,
                validate_hash=HASH,
                batch_size=1,  # set per call of `epoch_order`
                shuffle=shuffle,
                # Streaming adds the epoch to the seed. Mixed first, else epoch 1 of seed 0 would be epoch 0 of seed 1.
                shuffle_seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
                shuffle_block_size=SHUFFLE_BLOCK,
                num_canonical_nodes=1,  # the order must not depend on how many machines read it
                batching_method="per_stream",
            )
        # Protects the shard states, which only this process and its workers share.
        self._cache_filelock_path = os.path.join(streams[0].local, ".states.lock")
        self._checked: set[int] = set()

    def epoch_order(self, epoch: int, global_batch: int) -> np.ndarray:
        """Sample numbers of one epoch, (steps, global_batch), the same on every rank and for every number of ranks.

        A row holds samples of one bucket only. What does not fill a row is left out.
        """
        self.batch_size = global_batch
        with _quiet("streaming.base.batching.per_stream"):  # it warns of the left-out rest in every epoch
            order = generate_work(self.batching_method, self, _OneProcess.detect(), epoch, 0)
        return order.reshape(-1, global_batch)

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        shard_id, row = self.spanner[sample_id]
        if shard_id not in self._checked:
            self._drop_damaged_copy(shard_id)
            self.prepare_shard(shard_id)
            self._checked.add(shard_id)
        try:
            return super().get_item(sample_id, retry)
        except DataError:
            raise
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(f"{self._path(shard_id)}, row {row}: cannot be read ({error}).") from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            # Else it stays "being prepared", and whoever asks for it next waits for ever.
            self._shard_states[shard_id] = streaming_dataset._ShardState.REMOTE
            raise

    def _path(self, shard_id: int) -> Path:
        return self._sources[self.stream_per_shard[shard_id]] / self.shards[shard_id].zip_data.basename

    def _drop_damaged_copy(self, shard_id: int) -> None:
        """A decompressed shard left by an earlier run is used only if its hash is right; else it is made anew."""
        shard = self.shards[shard_id]
        path = Path(shard.dirname, shard.split, shard.raw_data.basename)
        if path.is_file() and get_hash(HASH, path.read_bytes()) != shard.raw_data.hashes[HASH]:
            logger.warning("%s is damaged; it is decompressed again", path)
            path.unlink(missing_ok=True)


class _CheckedStream(Stream):
    """One bucket. Several processes, also of different runs, may use its folder at the same time."""

    @property
    def lock(self) -> FileLock:
        return FileLock(os.path.join(self.local, ".lock"))

    def prepare_shard(self, shard: Any) -> int:
        name = shard.zip_data.basename
        source = Path(self.remote or self.local, name)
        if not source.is_file():
            raise DataError(f"{source} is missing. Restore it, or prepare the set again with overwrite=true.")
        with self.lock:
            try:
                return super().prepare_shard(shard)
            except ValueError as error:  # "Checksum failure"
                if self.remote is not None:  # `local` holds a copy of the damaged file: the next try copies anew
                    Path(self.local, name).unlink(missing_ok=True)
                raise DataError(
                    f"{source} is damaged ({error}). Restore it, or prepare the set again with overwrite=true."
                ) from error
            except OSError as error:
                raise OSError(
                    f"Cannot decompress {source} into {self.local}: {error}. Free space there, or set cache_dir."
                ) from error


def _open_stream(description: DatasetDescription, folder: Path, cache_dir: str | Path | None) -> _CheckedStream:
    """The bucket in `folder`, decompressed in place where that is possible and no cache_dir is given."""
    if cache_dir is None and os.access(folder, os.W_OK):
        return _CheckedStream(local=str(folder))
    if cache_dir is None:
        cache_dir = Path(tempfile.gettempdir()) / f"mds-cache-{os.getuid()}"
        logger.info("%s is read-only: its shards are decompressed below %s (cache_dir)", folder, cache_dir)
    # The fingerprint keeps the copies of two sets apart, also when one has replaced the other at the same path.
    local = Path(cache_dir) / description.fingerprint[:16] / folder.relative_to(description.root)
    local.mkdir(parents=True, exist_ok=True)
    return _CheckedStream(local=str(local), remote=str(folder), keep_zip=False)


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
def _locked(streams: list[_CheckedStream]) -> Iterator[None]:
    """Nobody else changes the streams' folders meanwhile. In one order for everybody, so that no two wait in a ring."""
    locks = [stream.lock for stream in sorted(streams, key=lambda stream: stream.local)]
    try:
        for lock in locks:
            lock.acquire()
        yield
    finally:
        for lock in reversed(locks):
            lock.release()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    noisy = logging.getLogger(name)
    before = noisy.disabled
    noisy.disabled = True
    try:
        yield
    finally:
        noisy.disabled = before
