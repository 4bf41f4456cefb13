"""Folders that appear whole or not at all: written under a temporary name beside the target, then renamed."""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNER = ".owner"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder to build `target` in; `publish` moves it into place. Removed on leaving, whatever happens.

    A killed process leaves its folder behind. It is known by a lock file that nobody holds any more, and the next call
    for the same target removes it; folders of processes that are still at work are left alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    outer, owner = _claim(target)
    try:
        inner = outer / "content"
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(outer)
        os.close(owner)


def publish(staged: Path, target: Path, *, replace: bool = False) -> None:
    """Rename a whole folder to `target`, safe against a crash or power loss at any moment.

    Raises FileExistsError where `target` exists and is not empty; with `replace` the old folder makes room.
    """
    sync_tree(staged)
    if replace and target.exists():
        # Into the staging folder: from there it is removed with it, also if this process is killed now.
        target.rename(staged.parent / "replaced")
    try:
        staged.rename(target)
    except OSError as error:
        if target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"{target} exists and is not empty.") from error
        raise
    _sync_entry(target.parent)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _claim(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and the open lock file that says its owner lives (released by the kernel)."""
    while True:
        outer = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        owner = os.open(outer / _OWNER, os.O_CREAT | os.O_RDWR)
        fcntl.flock(owner, fcntl.LOCK_EX)
        if (outer / _OWNER).exists():
            return outer, owner
        os.close(owner)  # another call took it for abandoned in the moment before the lock


def _remove_abandoned(target: Path) -> None:
    for outer in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        try:
            owner = os.open(outer / _OWNER, os.O_RDWR)
        except FileNotFoundError:
            continue  # another process is creating or removing it at this moment
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            shutil.rmtree(outer)
        finally:
            os.close(owner)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder` to the disk, so that a rename cannot survive without them."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
