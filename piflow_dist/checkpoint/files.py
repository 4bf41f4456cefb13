"""Folders of checkpoints on disk: names, manifests, atomic writes, what is complete and what is damaged.

run/checkpoints/step_00001200/{rank_00000.safetensors, ..., state.json, manifest.json}
run/checkpoints/latest          the newest complete step's folder name
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def file_digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps_on_disk(folder: Path) -> list[int]:
    """Steps of all finished checkpoint folders, newest first. Temporary folders do not count."""
    matches = (re.fullmatch(r"step_(\d{8})", path.name) for path in folder.glob("step_*") if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


def verify(folder: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated or changed since it was written.

    contents=False compares the shards' sizes only, not their hashes: terabytes take minutes to read.
    share: (i, n) reads the i-th of n parts of the files, where n processes check a checkpoint together.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}.")
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files.")
    for index, (name, expected) in enumerate(manifest["files"].items()):
        path = folder / name
        try:
            size, wanted = expected["size"], expected["sha256"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / MANIFEST} does not say size and sha256 of {name}.") from error
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes instead of {size}.")
        mine = contents and index % share[1] == share[0]
        try:
            damaged = (mine or name == STATE) and file_digest(path)["sha256"] != wanted
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if damaged:
            raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest's.")


def newest_complete(folder: Path, contents: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all whole (see verify), and a message for each newer one that is not."""
    problems = []
    for step in steps_on_disk(folder):
        candidate = folder / step_name(step)
        try:
            verify(candidate, contents)
        except CheckpointError as error:
            problems.append(f"{candidate.name} is skipped: {error}")
        else:
            return candidate, problems
    return None, problems
