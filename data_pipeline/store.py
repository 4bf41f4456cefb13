"""Where a set lies: a folder, or a remote store that mosaicml-streaming can download from (s3://, gs://, oci://, azure://, ...)."""

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

ATTEMPTS = 3
TIMEOUT_SECONDS = 120.0


def is_remote(root: str | Path) -> bool:
    return "://" in str(root)


def default_cache() -> Path:
    """For what has to be kept somewhere when no cache_dir is given."""
    return Path(tempfile.gettempdir()) / f"mds-cache-{os.getuid()}"


def mirror_folder(url: str) -> Path:
    """Where the dataset.json of a remote set is kept."""
    return default_cache() / f"remote-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


_downloaders: dict[tuple[int, str], Any] = {}


def download(url: str, target: Path) -> None:
    """Write `target`, whole or not at all. Raises FileNotFoundError or OSError naming the URL.

    The target's folder is this process's to write in; whatever was at `target` is replaced.
    """
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader

    scheme = url.partition("://")[0]
    if scheme not in DOWNLOADER_MAPPINGS:
        known = ", ".join(sorted(name for name in DOWNLOADER_MAPPINGS if name))
        raise ValueError(f"{url}: no store of kind {scheme!r} is known. Known: {known}, or a folder.")
    who = os.getpid(), scheme  # clients do not survive a fork
    if who not in _downloaders:
        _downloaders[who] = CloudDownloader.get(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            temporary.unlink(missing_ok=True)
            try:
                _downloaders[who].download(url, str(temporary), TIMEOUT_SECONDS)
                break
            except Exception as error:  # every store has exceptions of its own
                _downloaders[who].clean_up()
                if _is_missing(error):
                    raise FileNotFoundError(f"{url} is missing, or may not be read.") from error
                if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                    raise  # the disk, not the store
                if attempt == ATTEMPTS:
                    raise OSError(
                        f"{url} cannot be fetched after {ATTEMPTS} attempts ({type(error).__name__}: {error}). Check the "
                        "network, the credentials and, for other S3 stores than Amazon's, S3_ENDPOINT_URL."
                    ) from error
                time.sleep(0.5 * attempt)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_missing(error: Exception) -> bool:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return isinstance(error, FileNotFoundError) or code in ("404", "NoSuchKey", "NoSuchBucket", "403")


def read_stored(root: str, name: str, scratch: Path) -> bytes:
    """The bytes of a file of a set. A remote one goes through `scratch`, a file that is removed. Raises DataError if missing."""
    if not is_remote(root):
        path = Path(root, name)
        if not path.is_file():
            raise DataError(f"{path} is missing. Restore it, or prepare the set again with overwrite=true.")
        return path.read_bytes()
    try:
        download(f"{root.rstrip('/')}/{name}", scratch)
        return scratch.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{error} Restore it in the remote store.") from error
    finally:
        scratch.unlink(missing_ok=True)
