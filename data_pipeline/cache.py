"""Decompressed shards on the disk of a machine, shared by all its processes, of one run or several.

A shard is fetched and decompressed under a lock of its own, and appears under its name only when it is whole. With a
limit, the shards that were used longest ago, of whatever set, make room for a new one. A reader that loses its shard so
finds it missing and brings it back; on Linux one that is being read stays readable.
"""

import contextlib
import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_pipeline.description import HASH
from data_pipeline.errors import DataError
from data_pipeline.store import is_remote, read_stored

TOUCH_SECONDS = 5.0
"""How often a process says that it still uses a shard."""
ABANDONED_SECONDS = 3600.0
"""Downloads that nobody has written to for so long are those of killed processes."""
SHARE_OF_FREE_DISK = 0.8
"""The limit of a cache of remote shards where none is given."""
SPACE_LOCK = ".space.lock"
"""In a cache's folder; who holds it may write and remove shards."""

logger = logging.getLogger(__name__)


class ShardCache:
    """folder: where shards are kept, in subfolders. limit: bytes of all of them together; None: whatever the disk holds."""

    def __init__(self, folder: Path, limit: int | None):
        self.folder, self.limit = folder, limit
        self._used_at: dict[Path, float] = {}

    def bring(self, root: str, place: str, entry: dict[str, Any], local: Path) -> None:
        """Make sure that the shard `entry` of bucket `place` below `root` is in the folder `local`, whole.

        Raises DataError where the stored shard is missing or damaged (a remote one also when fetched again), OSError
        where the disk is full.
        """
        raw = local / entry["raw_data"]["basename"]
        stored = f"{place}/{(entry['zip_data'] or entry['raw_data'])['basename']}"
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(local / f".{raw.name}.lock"):
            # Another process may make room at any moment: a file that was there a moment ago is no error.
            with contextlib.suppress(FileNotFoundError):
                if _hash(raw.read_bytes()) == entry["raw_data"]["hashes"][HASH]:
                    self._touch(raw)
                    return
                # Left by a killed process or a power cut.
                logger.warning("%s is damaged; it is decompressed again", raw)
                with FileLock(self.folder / SPACE_LOCK):
                    raw.unlink()
            data = self._fetch(root, stored, entry, local)
            try:
                self._place(raw, data)
            except OSError as error:
                raise self._full(root, stored, len(data), error) from error

    def used(self, raw: Path) -> None:
        """A sample of this shard is being read."""
        if time.monotonic() - self._used_at.get(raw, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touch(raw)

    def _touch(self, raw: Path) -> None:
        self._used_at[raw] = time.monotonic()
        if self.limit is not None:
            with contextlib.suppress(FileNotFoundError):  # it has just made room for another
                os.utime(raw)

    def _fetch(self, root: str, stored: str, entry: dict[str, Any], local: Path) -> bytes:
        """The decompressed shard; what does not have the right hash is read once more."""
        from streaming.base.compression import decompress

        wanted = entry["zip_data"] or entry["raw_data"]
        name = f"{root.rstrip('/')}/{stored}"
        scratch = local / f".{Path(stored).name}.fetched"
        for last in (False, True):
            try:
                data = read_stored(root, stored, scratch)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._full(root, stored, wanted["bytes"], error) from error
                raise
            if _hash(data) == wanted["hashes"][HASH]:
                return decompress(entry["compression"], data) if entry["zip_data"] else data
            if not last:
                logger.warning("%s does not have the hash of the index; it is read again", name)
        where = "in the remote store" if is_remote(root) else "or prepare the set again with overwrite=true"
        raise DataError(
            f"{name} is damaged ({len(data)} bytes, not of the hash that the index has). Restore it {where}."
        )

    def _place(self, raw: Path, data: bytes) -> None:
        temporary = raw.with_name(raw.name + ".tmp")
        # The lock is held while writing, so that what processes write at the same time stays within the limit together; also
        # by those without a limit, as what is written without the lock is removed by those that have one.
        with FileLock(self.folder / SPACE_LOCK):
            if self.limit is not None:
                self._make_room(len(data), raw)
            try:
                temporary.write_bytes(data)
                os.rename(temporary, raw)
            finally:
                temporary.unlink(missing_ok=True)
        self._touch(raw)

    def _make_room(self, wanted: int, raw: Path) -> None:
        kept, total = [], 0
        for path in self.folder.rglob("*"):
            if path.suffix not in (".mds", ".tmp", ".part"):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process tidies up its own
                status = path.stat()
                if path.suffix == ".tmp" or (
                    path.suffix == ".part" and time.time() - status.st_mtime > ABANDONED_SECONDS
                ):
                    path.unlink()  # written under the lock that we hold, or long ago: its process was killed
                    continue
                total += status.st_size
                if path.suffix == ".mds":
                    kept.append((status.st_mtime, status.st_size, path))
        for _, size, path in sorted(kept):
            if total + wanted <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size
        if total + wanted > self.limit:
            raise ValueError(
                f"The cache {self.folder} may hold {self.limit} bytes, shard {raw.name} alone has {wanted}. "
                "Use a larger cache_gb."
            )

    def _full(self, root: str, stored: str, wanted: int, error: OSError) -> OSError:
        free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
        return OSError(
            error.errno,
            f"Cannot decompress {root}/{stored} into {self.folder}: {error.strerror or error}. {wanted} bytes are needed, "
            f"{free} are free. Free space there, or set cache_dir to another disk, or a smaller cache_gb.",
        )


def default_limit(folder: Path) -> int:
    """Of a cache of remote shards."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / SPACE_LOCK):  # other processes make room here
        held = sum(path.stat().st_size for path in folder.rglob("*.mds"))
        return int(SHARE_OF_FREE_DISK * (shutil.disk_usage(folder).free + held))


def _hash(data: bytes) -> str:
    from streaming.base.hashing import get_hash

    return get_hash(HASH, data)
