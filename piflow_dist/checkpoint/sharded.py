"""Save a training run: every rank its own shards of weights (fp32), optimiser and EMA; rank 0 the counters and cursor.

Here is what all ranks do together to write one checkpoint, and to find the one to go on from. saver.py does it beside training.
"""

import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piflow_dist.checkpoint.files import (
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    file_digest,
    shard_name,
    step_name,
    steps_on_disk,
    sync_folder,
    verify,
    write_atomic,
)
from piflow_dist.checkpoint.phases import enter
from piflow_dist.checkpoint.reader import EMA, OPTIMIZER, WEIGHTS
from piflow_dist.checkpoint.retention import Retention, remove_old
from piflow_dist.checkpoint.snapshot import Snapshot
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.zero import TrainedModel

log = logging.getLogger(__name__)
MESSAGE_BYTES = 2048


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete. bytes: of all ranks; seconds: of the slowest rank, until its shard was on disk."""

    path: Path
    bytes: int
    seconds: float


def named_tensors(model: TrainedModel, ema_flats: list[Tensor]) -> dict[str, Tensor]:
    """What a rank saves, by its name in the file."""
    tensors = {f"{WEIGHTS}/{name}": value for name, value in model.named(model.masters).items()}
    tensors |= {f"{EMA}/{name}": value for name, value in model.named(ema_flats).items()}
    return tensors | {f"{OPTIMIZER}/{name}": value for name, value in model.optimizer_state().items()}


def state_text(step: int, model: TrainedModel, state: dict[str, Any], topology: Topology) -> str:
    """state.json, made at the step boundary: what it describes changes with the next step."""
    parameters = {shard.name: {"shape": shard.shape, "split_dim": shard.split_dim} for shard in model.shards}
    content = {"step": step, "dp_size": topology.dp_size, "tp": topology.tp, "parameters": parameters, **state}
    return json.dumps(content, indent=1)


def save_checkpoint(
    folder: Path,
    step: int,
    model: TrainedModel,
    ema_flats: list[Tensor],
    state: dict[str, Any],
    topology: Topology,
    keep: int,
) -> Path:
    """Write run/checkpoints/step_N and wait for it; collective. A training saves through CheckpointSaver instead.

    state: JSON-able counters, cursor and settings; they come back in LoadedState.state.
    Raises OSError (disk full, read-only) on every rank where one of them could not write; older checkpoints stay.
    """
    snapshot = Snapshot(page_locked=topology.device.type == "cuda")
    snapshot.take(named_tensors(model, ema_flats))
    text = state_text(step, model, state, topology)
    group = dist.new_group(backend="gloo")
    return write_checkpoint(folder, step, snapshot, text, topology, group, Retention(keep)).path


def write_checkpoint(
    folder: Path,
    step: int,
    snapshot: Snapshot,
    state: str,
    topology: Topology,
    group: dist.ProcessGroup,
    retention: Retention,
) -> Written:
    """Write run/checkpoints/step_N from every rank's snapshot. Under a temporary name until every rank's file is on disk.

    group: gloo over all ranks, used by nothing else meanwhile. All that ranks know of each other's progress comes through
    it: what a shared file system shows of other nodes' files may be old.
    Raises OSError on every rank where one of them failed; older checkpoints stay.
    """
    final, temporary = folder / step_name(step), folder / f".{step_name(step)}.tmp"
    failed = f"Checkpoint of step {step} could not be written to {folder}"
    pause = partial(enter, step=step, rank=topology.rank)
    together = partial(do_together, topology=topology, group=group)
    together(lambda: make_empty(temporary) if topology.is_main else (), failed)
    began = time.perf_counter()

    def write_shard() -> tuple[int, ...]:
        temporary.mkdir(exist_ok=True)  # for this machine's view of a shared file system
        digest = snapshot.write(temporary / shard_name(topology.rank), pause)
        # Sent, not left in a file: rank 0 need read nothing to write the manifest.
        return (snapshot.size, int((time.perf_counter() - began) * 1e9), *struct.unpack("<4q", bytes.fromhex(digest)))

    def finish(shards: list[tuple[int, ...]]) -> tuple[int, ...]:
        pause("manifest")
        files = {shard_name(rank): describe_shard(numbers) for rank, numbers in enumerate(shards)}
        write_manifest(temporary, state, files)
        pause("rename")
        if final.exists():
            # Resumed from an older step because this one was damaged: never delete before the new one is whole.
            aside = folder / f".{step_name(step)}.removed"
            shutil.rmtree(aside, ignore_errors=True)  # of a kill at this place
            os.replace(final, aside)
        os.replace(temporary, final)
        sync_folder(folder)
        tidy(folder, step, retention, pause)
        return ()

    try:
        shards = together(write_shard, failed)
        together(lambda: finish(shards) if topology.is_main else (), failed)
    except OSError:
        if topology.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its bytes are wanted back
        raise
    return Written(final, sum(numbers[0] for numbers in shards), max(numbers[1] for numbers in shards) / 1e9)


def tidy(folder: Path, step: int, retention: Retention, pause: Callable[[str], None]) -> None:
    """What follows a complete checkpoint. It is no reason to stop a training: whatever is in the way stays, and is named."""
    try:
        pause("latest")
        write_atomic(folder / LATEST, step_name(step) + "\n")
        remove_old(folder, retention, newest=step, pause=pause)
    except OSError as error:
        log.warning(
            "step %d is saved, but %s cannot be tidied: %s. Remove by hand what is in the way.", step, folder, error
        )


def make_empty(folder: Path) -> tuple[int, ...]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return ()


def describe_shard(numbers: tuple[int, ...]) -> dict[str, Any]:
    size, _, *digest = numbers
    return {"size": size, "sha256": struct.pack("<4q", *digest).hex()}


def write_manifest(folder: Path, state: str, shards: dict[str, Any]) -> None:
    write_atomic(folder / STATE, state)
    files = {STATE: file_digest(folder / STATE), **shards}
    write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))


NUMBERS = 6
"""Of a rank's shard: size, nanoseconds, SHA-256 as four."""


def do_together(
    work: Callable[[], tuple[int, ...]], what: str, topology: Topology, group: dist.ProcessGroup
) -> list[tuple[int, ...]]:
    """Do a part on every rank, wait for all, and give every rank's up to NUMBERS numbers to each.

    Raises OSError(what: reason) on every rank where one of them failed, so that none waits for the others.
    """
    error, numbers = None, ()
    try:
        numbers = work()
    except Exception as problem:  # whatever it is, the other ranks wait
        error = problem
    mine = torch.zeros(1 + NUMBERS, dtype=torch.int64)
    mine[0] = error is not None
    mine[1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(topology.world_size)]
    dist.all_gather(everyone, mine, group=group)
    if error is not None:
        raise OSError(f"{what}: {error}. Older checkpoints are as they were.") from error
    failed = [rank for rank, theirs in enumerate(everyone) if theirs[0]]
    if failed:
        raise OSError(f"{what}: process {failed[0]} failed, see its log. Older checkpoints are as they were.")
    return [tuple(theirs[1:].tolist()) for theirs in everyone]


def find_checkpoint(folder: Path, topology: Topology) -> tuple[Path | None, list[str]]:
    """newest_complete for all ranks (collective), each of which reads its share of the files."""
    listed = steps_on_disk(folder) if topology.is_main else []
    count = torch.tensor([len(listed)], device=topology.device)
    dist.broadcast(count, 0)
    candidates = torch.tensor(listed or [0] * int(count), dtype=torch.int64, device=topology.device)
    dist.broadcast(candidates, 0)
    problems = []
    for step in candidates.tolist():
        candidate, message = folder / step_name(step), ""
        try:
            verify(candidate, share=(topology.rank, topology.world_size))
        except CheckpointError as error:
            message = str(error)
        found = next((text for text in share_messages(message, topology) if text), None)
        if found is None:
            return candidate, problems
        problems.append(f"{candidate.name} is skipped: {found}")
    return None, problems


def share_messages(message: str, topology: Topology) -> list[str]:
    """Every rank's message to all (collective)."""
    content = message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(topology.device)
    everyone = [torch.empty_like(mine) for _ in range(topology.world_size)]
    dist.all_gather(everyone, mine)
    return [bytes(theirs.tolist()).rstrip(b"\0").decode(errors="replace") for theirs in everyone]
