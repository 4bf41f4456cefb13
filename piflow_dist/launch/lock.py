"""One user of a folder at a time, known to the kernel: a killed process holds nothing."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from piflow_dist.config import ConfigError


@contextmanager
def only_user(lock: Path, option: str) -> Iterator[None]:
    """Hold the file `lock`, which stays behind empty. Raises ConfigError where another process holds it.

    option: "key=folder" of the request, for the message.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"{option} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode() or "another process"
            raise ConfigError(f"{option} is in use by {holder}. Wait for it, or choose another folder.") from error
        os.ftruncate(handle, 0)  # of one that was killed
        os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)
