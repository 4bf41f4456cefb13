"""Rewrite a checkpoint as another number of processes would have written it.

Not needed to resume, which reads any world's checkpoint; it saves every rank of a large world from reading what it throws away.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from piflow_dist.checkpoint.files import (
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    file_digest,
    read_json,
    shard_name,
    step_name,
    steps_on_disk,
    verify,
    write_atomic,
)
from piflow_dist.checkpoint.reader import OPTIMIZER, Layout, ShardReader
from piflow_dist.checkpoint.runs import read_run_config
from piflow_dist.checkpoint.streaming import TYPES, TensorFile, new_folder
from piflow_dist.config import config_values, require
from piflow_dist.models.architecture import architecture


def reshard(
    source: Path, run: Path, dp: int, tp: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write run/checkpoints/step_N for dp x tp processes from the checkpoint `source`; compared with it before it appears.

    Raises ConfigError for a world that cannot train this run, CheckpointError for damaged files and full disks.
    """
    verify(source)
    saved = read_json(source / STATE)
    final = run / "checkpoints" / step_name(saved["step"])
    require(not final.exists(), f"{final} exists. Choose another folder; nothing is overwritten.")
    state = state_for(source, saved, dp, tp)
    before, old, new = ShardReader(source, saved["dp_size"], saved["tp"]), layouts_of(saved), layouts_of(state)
    with new_folder(final) as folder:
        write_ranks(folder, before, old, new, dp, tp, progress)
        write_atomic(folder / STATE, json.dumps(state, indent=1))
        names = [STATE, *(shard_name(rank) for rank in range(dp * tp))]
        digests = {name: file_digest(folder / name) for name in names}
        write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, "files": digests}, indent=1))
        check_equal(folder, before, old, new, dp, tp)
    if saved["step"] == steps_on_disk(final.parent)[0]:
        write_atomic(final.parent / LATEST, final.name + "\n")
    return final


def layouts_of(state: dict[str, Any]) -> dict[str, Layout]:
    return {name: Layout(**layout) for name, layout in state["parameters"].items()}


def state_for(source: Path, state: dict[str, Any], dp: int, tp: int) -> dict[str, Any]:
    """The state as a world of dp x tp would have saved it; its configuration checks what such a world may be."""
    require(dp > 0 and tp > 0, f"dp={dp} tp={tp}: both must be greater than zero.")
    run = read_run_config(source)
    run = dataclasses.replace(
        run,
        parallel=dataclasses.replace(run.parallel, tp=tp),
        launch=dataclasses.replace(run.launch, processes=dp * tp),
    )
    dims = {name: layout["split_dim"] for name, layout in state["parameters"].items()}
    if tp > 1 and tp != state["tp"]:
        with warnings.catch_warnings(action="ignore"):  # Megatron's, about packages that it could use
            from piflow_dist.parallel.tensor import split_dim  # takes seconds to import

        plan = architecture(run.model).plan
        dims = {name: split_dim(name, plan) for name in dims}
    elif tp == 1:
        dims = dict.fromkeys(dims)
    parameters = {}
    for name, layout in state["parameters"].items():
        whole = [size * (state["tp"] if dim == layout["split_dim"] else 1) for dim, size in enumerate(layout["shape"])]
        shape = [size // (tp if dim == dims[name] else 1) for dim, size in enumerate(whole)]
        parameters[name] = {"shape": shape, "split_dim": dims[name]}
    return {**state, "config": config_values(run), "dp_size": dp, "tp": tp, "parameters": parameters}


def parameter_of(key: str) -> str:
    """weights/NAME, ema/NAME or optimizer/STATE/NAME -> NAME."""
    kind, _, name = key.partition("/")
    return name if kind != OPTIMIZER else name.partition("/")[2]


def write_ranks(
    folder: Path,
    before: ShardReader,
    old: dict[str, Layout],
    new: dict[str, Layout],
    dp: int,
    tp: int,
    progress: Callable[[int, int], None],
) -> None:
    """All ranks' files side by side, so that every tensor is read once and one is in memory."""
    keys = before.names()
    slices = {key: before.slices[0][0].get_slice(key) for key in keys}
    scalars = {key for key in keys if not slices[key].get_shape()}
    specs = {}
    for key in keys:
        size = -(-new[parameter_of(key)].numel // dp)
        specs[key] = (TYPES[slices[key].get_dtype()], () if key in scalars else (size,))
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(folder / shard_name(rank), specs)) for rank in range(dp * tp)]
        for done, key in enumerate(keys, 1):
            if key in scalars:
                value = before.slices[0][0].get_tensor(key)
                for file in files:
                    file.write(key, value)
            else:
                layout, size = new[parameter_of(key)], specs[key][1][0]
                whole = before.read_whole(key, old[parameter_of(key)])
                parts = [whole] * tp if layout.split_dim is None else whole.chunk(tp, layout.split_dim)
                for tp_rank, part in enumerate(parts):
                    flat = F.pad(part.flatten(), (0, dp * size - part.numel()))
                    for dp_rank in range(dp):
                        files[dp_rank * tp + tp_rank].write(key, flat[dp_rank * size : (dp_rank + 1) * size])
            progress(done, len(keys))


def check_equal(
    folder: Path, before: ShardReader, old: dict[str, Layout], new: dict[str, Layout], dp: int, tp: int
) -> None:
    """Load what was written and compare it with the source, bit for bit."""
    verify(folder)
    after = ShardReader(folder, dp, tp)
    for key in before.names():
        name = parameter_of(key)
        if before.slices[0][0].get_slice(key).get_shape():
            same = torch.equal(before.read_whole(key, old[name]), after.read_whole(key, new[name]))
        else:
            same = all(
                torch.equal(file.get_tensor(key), before.slices[0][0].get_tensor(key))
                for files in after.slices
                for file in files
            )
        if not same:
            raise CheckpointError(
                f"{os.fspath(folder)}: {key} was not written as it was read. The disk may be failing."
            )
