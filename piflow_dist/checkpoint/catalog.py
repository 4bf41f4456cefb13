"""What people ask about checkpoints: which there are, what is in them, whether they are whole; and removing one safely."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from piflow_dist.checkpoint.files import (
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    newest_complete,
    read_json,
    step_name,
    steps_on_disk,
    sync_folder,
    verify,
    write_atomic,
)
from piflow_dist.checkpoint.reader import EMA, OPTIMIZER, WEIGHTS, Layout, ShardReader
from piflow_dist.checkpoint.runs import resolve_checkpoint
from piflow_dist.config import ConfigError, require


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder as found. problem: why it cannot be used, None where it is whole; state: of one that can be read."""

    path: Path
    bytes: int
    written: datetime | None
    problem: str | None
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state.get("step", self.path.name.removeprefix("step_")))

    @property
    def world(self) -> str:
        dp, tp = self.state.get("dp_size"), self.state.get("tp")
        return "" if dp is None else f"dp={dp} tp={tp}"


def checkpoint_folders(source: str) -> list[Path]:
    """The checkpoints of a run folder, newest first, or the one that `source` is. Raises ConfigError where there are none."""
    path = Path(source)
    require(path.is_dir(), f"{source} does not exist. Give a run folder or a checkpoint folder.")
    if path.name.startswith("step_") or (path / MANIFEST).is_file():
        return [path]
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    found = [folder / step_name(step) for step in steps_on_disk(folder)]
    require(
        bool(found), f"{source} holds no checkpoints (no {folder}/step_N). Give a run folder or a checkpoint folder."
    )
    return found


def look_at_all(source: str, contents: bool) -> list[Entry]:
    """The checkpoints of `source`, less those that a training removed while they were looked at."""
    entries = []
    for path in checkpoint_folders(source):
        try:
            entries.append(look_at(path, contents))
        except FileNotFoundError:
            if path.exists():
                raise
    return entries


def look_at(path: Path, contents: bool) -> Entry:
    """contents: compare the hashes of all files too, not the sizes alone. Raises FileNotFoundError where it is being removed."""
    try:
        verify(path, contents)
        problem = None
    except CheckpointError as error:
        problem = str(error)
    try:
        state = read_json(path / STATE)
    except CheckpointError:
        state = {}
    files = [file for file in path.iterdir() if file.is_file()]
    manifest = path / MANIFEST
    written = datetime.fromtimestamp(manifest.stat().st_mtime) if manifest.exists() else None
    return Entry(path, sum(file.stat().st_size for file in files), written, problem, state)


def leftovers(source: str) -> list[Path]:
    """What killed saves left behind; the run's next save removes them."""
    folder = checkpoint_folders(source)[0].parent
    return sorted([*folder.glob(".step_*.tmp"), *folder.glob(".step_*.removed")])


@dataclass(frozen=True)
class Contents:
    parameters: int
    tensors: int
    bytes: dict[str, int]
    """Of weights, ema and optimizer, over all ranks."""


def describe_contents(path: Path, state: dict[str, Any]) -> Contents:
    """From the headers of the rank files; no values are read."""
    reader = ShardReader(path, state["dp_size"], state["tp"])
    layouts = [Layout(**layout) for layout in state["parameters"].values()]
    parameters = sum(layout.numel * (state["tp"] if layout.split_dim is not None else 1) for layout in layouts)
    sizes: Counter[str] = Counter({WEIGHTS: 0, EMA: 0, OPTIMIZER: 0})
    for file in (file for files in reader.slices for file in files):
        for key in file.keys():  # noqa: SIM118 (no dict)
            shape = file.get_slice(key).get_shape()
            sizes[key.partition("/")[0]] += 4 * (shape[0] if shape else 1)
    return Contents(parameters, len(layouts), dict(sizes))


def remove(source: str, step: int | None, yes: bool) -> Path:
    """Delete one checkpoint. Raises ConfigError where it is the only good one of its run, or `yes` was not given."""
    found = checkpoint_folders(source)
    if step is not None:
        found = [path for path in found if path.name == step_name(step)]
        require(bool(found), f"{source} has no checkpoint of step {step}.")
    require(
        len(found) == 1,
        f"{source} has {len(found)} checkpoints ({', '.join(path.name for path in found[:6])}). Say which: step=N.",
    )
    (path,) = found
    folder = path.parent
    if look_at(path, contents=True).problem is None:
        others = [folder / step_name(other) for other in steps_on_disk(folder) if step_name(other) != path.name]
        require(
            any(look_at(other, contents=True).problem is None for other in others),
            f"{path} is the only good checkpoint of its run and stays. Delete the run's folder if you want it gone.",
        )
    require(yes, f"{path} would be deleted for good. Say yes=true.")
    doomed = folder / f".{path.name}.removed"
    try:
        # Renamed first: a kill inside the deletion must not leave a half-empty folder under a good name.
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        sync_folder(folder)
        point_latest(folder, path.name)
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"{path} could not be deleted: {error.strerror or error}.") from error
    return path


def point_latest(folder: Path, removed: str) -> None:
    latest = folder / LATEST
    if not latest.exists() or latest.read_text().strip() != removed:
        return
    newest, _ = newest_complete(folder)
    if newest is None:
        latest.unlink()
    else:
        write_atomic(latest, newest.name + "\n")


def one_checkpoint(source: str) -> Path:
    """The checkpoint that `source` is, or the newest complete one of the run that it is."""
    path = Path(source)
    if path.name.startswith("step_") and path.is_dir():
        return path
    try:
        return resolve_checkpoint(source, "checkpoint")
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("checkpoint=")) from error
