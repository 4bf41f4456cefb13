"""Read a run's checkpoint: this rank's shards of it, or whole parameters. Knows nothing of engines or ranks of its own."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piflow_dist.checkpoint.files import MANIFEST, STATE, CheckpointError, read_json, shard_name, verify

WEIGHTS, EMA, OPTIMIZER = "weights", "ema", "optimizer"


@dataclass
class LoadedState:
    """This rank's share of a checkpoint."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def load_checkpoint(
    path: Path,
    dp_rank: int,
    dp_size: int,
    tp_rank: int = 0,
    tp: int = 1,
    split_dims: Mapping[str, int | None] | None = None,
) -> LoadedState:
    """This rank's shards of a verified checkpoint, also where it was saved on other numbers of ranks.

    split_dims: along which dimension this run splits each parameter over its tp ranks (None: not at all), where tp > 1. The
    checkpoint knows only how the run split that saved it.
    """
    state = read_json(path / STATE)
    reader = ShardReader(path, state["dp_size"], state["tp"])
    tensors: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, EMA: {}, OPTIMIZER: {}}
    for key in reader.names():
        kind, _, name = key.partition("/")
        parameter = name if kind != OPTIMIZER else name.partition("/")[2]
        saved, split_dim = Layout(**state["parameters"][parameter]), split_dims[parameter] if tp > 1 else None
        tensors[kind][name] = reader.read(key, saved, dp_rank, dp_size, tp_rank, tp, split_dim)
    return LoadedState(tensors[WEIGHTS], tensors[EMA], tensors[OPTIMIZER], state)


class CheckpointWeights:
    """Trained parameters of a verified checkpoint by name, fp32, whole; read one by one. Raises CheckpointError."""

    def __init__(self, path: Path, ema: bool = True):
        verify(path)
        state = read_json(path / STATE)
        self.path, self.origin, self.kind = path, str(path), EMA if ema else WEIGHTS
        self.reader = ShardReader(path, state["dp_size"], state["tp"])
        self.layouts = {name: Layout(**layout) for name, layout in state["parameters"].items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tp = len(self.reader.slices)
        return {
            name: tuple(size * (tp if dim == layout.split_dim else 1) for dim, size in enumerate(layout.shape))
            for name, layout in self.layouts.items()
        }

    def view(self, name: str) -> Tensor:
        return self.reader.read_whole(f"{self.kind}/{name}", self.layouts[name])

    def fingerprint(self) -> str:
        """Of all contents: the manifest has the hash of every file."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Layout:
    """How a parameter was saved. shape: of one tensor-parallel slice, a part along split_dim (None: of the whole)."""

    shape: list[int]
    split_dim: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class ShardReader:
    """Flattened parameters across the rank files of one checkpoint; reads only the elements that are asked for."""

    def __init__(self, folder: Path, dp_size: int, tp: int):
        try:
            files = [safe_open(folder / shard_name(rank), framework="pt") for rank in range(dp_size * tp)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
        self.slices = [files[tp_rank::tp] for tp_rank in range(tp)]
        """Files by tensor-parallel rank, then data-parallel rank."""

    def names(self) -> list[str]:
        return list(self.slices[0][0].keys())

    def read(
        self, key: str, layout: Layout, dp_rank: int, dp_size: int, tp_rank: int, tp: int, split_dim: int | None
    ) -> Tensor:
        """The elements of one rank, padded with zeros to the common shard size; scalars as they are.

        layout: as saved. split_dim: along which this run splits the parameter over tp ranks; None: not at all.
        """
        if not self.slices[0][0].get_slice(key).get_shape():
            return self.slices[0][0].get_tensor(key)
        if layout.split_dim == split_dim and (split_dim is None or tp == len(self.slices)):
            return self._read_flat(key, layout.numel, dp_rank, dp_size, 0 if split_dim is None else tp_rank)
        whole = self.read_whole(key, layout)
        flat = (whole if split_dim is None else whole.chunk(tp, split_dim)[tp_rank]).flatten()
        size = -(-len(flat) // dp_size)
        mine = flat[dp_rank * size : (dp_rank + 1) * size]
        return F.pad(mine, (0, size - len(mine)))

    def read_whole(self, key: str, layout: Layout) -> Tensor:
        wanted = range(len(self.slices) if layout.split_dim is not None else 1)
        parts = [self._read_flat(key, layout.numel, 0, 1, tp_rank).reshape(layout.shape) for tp_rank in wanted]
        return parts[0] if layout.split_dim is None else torch.cat(parts, layout.split_dim)

    def _read_flat(self, key: str, numel: int, dp_rank: int, dp_size: int, tp_rank: int) -> Tensor:
        """Elements of rank `dp_rank` of `dp_size` of one tensor-parallel slice."""
        files = self.slices[tp_rank]
        saved_size, size = files[0].get_slice(key).get_shape()[0], -(-numel // dp_size)
        start, end = dp_rank * size, min((dp_rank + 1) * size, numel)
        pieces = []
        for rank, file in enumerate(files):
            low, high = max(start, rank * saved_size), min(end, (rank + 1) * saved_size)
            if low < high:
                pieces.append(file.get_slice(key)[low - rank * saved_size : high - rank * saved_size])
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        return F.pad(flat, (0, size - len(flat)))
