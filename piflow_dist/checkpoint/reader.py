"""Read a run's checkpoint: this rank's shards of it, or whole parameters. Knows nothing of engines or ranks of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piflow_dist.checkpoint.files import STATE, CheckpointError, read_json, shard_name, verify

WEIGHTS, EMA, OPTIMIZER = "weights", "ema", "optimizer"


@dataclass
class LoadedState:
    """This rank's share of a checkpoint."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def load_checkpoint(path: Path, dp_rank: int, dp_size: int) -> LoadedState:
    """This rank's shards of a verified checkpoint, also where it was saved on another number of ranks."""
    state = read_json(path / STATE)
    reader = ShardReader(path, state["dp_size"])
    tensors: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, EMA: {}, OPTIMIZER: {}}
    for key in reader.names():
        kind, _, name = key.partition("/")
        shape = state["parameters"][name if kind != OPTIMIZER else name.partition("/")[2]]
        tensors[kind][name] = reader.read(key, numel_of(shape), dp_rank, dp_size)
    return LoadedState(tensors[WEIGHTS], tensors[EMA], tensors[OPTIMIZER], state)


def read_weights(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """Whole trained parameters, fp32, by name: for sampling, export and as a teacher. Raises CheckpointError."""
    verify(path)
    state = read_json(path / STATE)
    reader = ShardReader(path, state["dp_size"])
    kind = EMA if ema else WEIGHTS
    return {
        name: reader.read(f"{kind}/{name}", numel_of(shape), 0, 1)[: numel_of(shape)].reshape(shape)
        for name, shape in state["parameters"].items()
    }


def numel_of(shape: list[int]) -> int:
    return torch.Size(shape).numel()


class ShardReader:
    """Flattened parameters across the rank files of one checkpoint; reads only the elements that are asked for."""

    def __init__(self, folder: Path, dp_size: int):
        try:
            self.files = [safe_open(folder / shard_name(rank), framework="pt") for rank in range(dp_size)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error

    def names(self) -> list[str]:
        return list(self.files[0].keys())

    def read(self, key: str, numel: int, dp_rank: int, dp_size: int) -> Tensor:
        """Elements of rank `dp_rank` of `dp_size`, padded with zeros to the common shard size; scalars as they are."""
        first = self.files[0].get_slice(key)
        if not first.get_shape():
            return self.files[0].get_tensor(key)
        saved_size, size = first.get_shape()[0], -(-numel // dp_size)
        start, end = dp_rank * size, min((dp_rank + 1) * size, numel)
        pieces = []
        for rank, file in enumerate(self.files):
            low, high = max(start, rank * saved_size), min(end, (rank + 1) * saved_size)
            if low < high:
                pieces.append(file.get_slice(key)[low - rank * saved_size : high - rank * saved_size])
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        return torch.nn.functional.pad(flat, (0, size - len(flat)))
