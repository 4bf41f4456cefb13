"""Save a training run: every rank its own shards of weights (fp32), optimiser and EMA; rank 0 the counters and cursor."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from piflow_dist.checkpoint.files import (
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    file_digest,
    newest_complete,
    read_json,
    remove_old,
    shard_name,
    step_name,
    sync_folder,
    write_atomic,
)
from piflow_dist.checkpoint.reader import EMA, OPTIMIZER, WEIGHTS
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.zero import TrainedModel


def save_checkpoint(
    folder: Path,
    step: int,
    model: TrainedModel,
    ema_flats: list[Tensor],
    state: dict[str, Any],
    topology: Topology,
    keep: int,
) -> Path:
    """Write run/checkpoints/step_N; collective. Under a temporary name until every rank's file is on disk.

    state: JSON-able counters, cursor and settings; they come back in LoadedState.state.
    Raises OSError (disk full, read-only) on every rank where one of them could not write; older checkpoints stay.
    """
    final, temporary = folder / step_name(step), folder / f".{step_name(step)}.tmp"
    if topology.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    error = None
    try:
        write_shard(temporary, model, ema_flats, topology)
    except (OSError, SafetensorError) as problem:
        error = problem
    stop_if_any_failed(error, topology, f"Checkpoint of step {step} could not be written to {folder}")
    if topology.is_main:
        try:
            write_manifest(temporary, step, model, state, topology)
            if final.exists():
                # Resumed from an older step because this one was damaged: never delete before the new one is whole.
                os.replace(final, folder / f".{step_name(step)}.removed")
            os.replace(temporary, final)
            sync_folder(folder)
            write_atomic(folder / LATEST, final.name + "\n")
            remove_old(folder, keep, newest=step)
        except OSError as problem:
            error = problem
    stop_if_any_failed(error, topology, f"Checkpoint of step {step} could not be finished in {folder}")
    return final


def write_shard(folder: Path, model: TrainedModel, ema_flats: list[Tensor], topology: Topology) -> None:
    tensors = {f"{WEIGHTS}/{name}": value for name, value in model.named(model.masters).items()}
    tensors |= {f"{EMA}/{name}": value for name, value in model.named(ema_flats).items()}
    tensors |= {f"{OPTIMIZER}/{name}": value for name, value in model.optimizer_state().items()}
    path = folder / shard_name(topology.rank)
    save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    # Hashed by the rank that wrote it, so that rank 0 need not read every rank's bytes.
    write_atomic(path.with_suffix(".json"), json.dumps(file_digest(path)))


def write_manifest(folder: Path, step: int, model: TrainedModel, state: dict, topology: Topology) -> None:
    parameters = {shard.name: {"shape": shard.shape, "split_dim": shard.split_dim} for shard in model.shards}
    content = {"step": step, "dp_size": topology.dp_size, "tp": topology.tp, "parameters": parameters, **state}
    write_atomic(folder / STATE, json.dumps(content, indent=1))
    files = {STATE: file_digest(folder / STATE)}
    for rank in range(topology.world_size):
        digest = folder / Path(shard_name(rank)).with_suffix(".json")
        files[shard_name(rank)] = read_json(digest)
        digest.unlink()
    write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))


def stop_if_any_failed(error: Exception | None, topology: Topology, what: str) -> None:
    """Raise on every rank where any failed, so that none waits for the others in the next collective."""
    failed = torch.tensor([float(error is not None)], device=topology.device)
    dist.all_reduce(failed)
    if error is not None:
        raise OSError(f"{what}: {error}") from error
    if failed.item() > 0:
        raise OSError(f"{what}: another process failed, see its log.")


def find_checkpoint(folder: Path, topology: Topology) -> tuple[Path | None, list[str]]:
    """newest_complete, decided by rank 0 for all (collective)."""
    path, problems = newest_complete(folder) if topology.is_main else (None, [])
    step = torch.tensor([-1 if path is None else int(path.name.removeprefix("step_"))], device=topology.device)
    dist.broadcast(step, 0)
    return (folder / step_name(int(step)) if step >= 0 else None), problems
