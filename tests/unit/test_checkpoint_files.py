"""Checkpoints on disk: whole or not at all, damage named, old ones removed, slices for another number of ranks."""

import errno
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_weights, rewrite_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from piflow_dist.checkpoint.files import (
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    file_digest,
    newest_complete,
    shard_name,
    step_name,
    steps_on_disk,
    verify,
    write_atomic,
)
from piflow_dist.checkpoint.reader import load_checkpoint
from piflow_dist.checkpoint.retention import Retention, remove_old
from piflow_dist.checkpoint.runs import resolve_checkpoint
from piflow_dist.checkpoint.sharded import tidy
from piflow_dist.checkpoint.snapshot import Snapshot

SHAPES = {"head.weight": (3, 5), "norm.bias": (7,), "scalar": (1,), "even": (4, 2), "column": (8, 3), "row": (3, 8)}
SPLIT = {"column": 0, "row": 1}
"""Parameters that tensor parallelism splits, and along which dimension."""


def split_dims(tp: int) -> dict[str, int | None]:
    return {name: SPLIT.get(name) if tp > 1 else None for name in SHAPES}


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def shard_of(value: Tensor, rank: int, dp_size: int, name: str = "", tp: int = 1) -> Tensor:
    """ZeRO's slice of a tensor-parallel one: rank-th of dp_size equal pieces of the flattened value, padded with zeros."""
    if tp > 1 and name in SPLIT:
        value = value.chunk(tp, SPLIT[name])[rank % tp]
    rank //= tp
    size = math.ceil(value.numel() / dp_size)
    flat = torch.zeros(size * dp_size)
    flat[: value.numel()] = value.flatten()
    return flat[rank * size : (rank + 1) * size].clone()


def write_checkpoint(folder: Path, step: int, dp_size: int = 2, tp: int = 1) -> Path:
    """A checkpoint as the docstring of checkpoint/files.py describes it, from values that tests know."""
    path = folder / step_name(step)
    path.mkdir(parents=True)
    for rank in range(dp_size * tp):
        tensors = {}
        for seed, kind in enumerate(("weights", "ema", "optimizer/exp_avg")):
            for name, value in parameters(seed).items():
                tensors[f"{kind}/{name}"] = shard_of(value, rank, dp_size, name, tp)
        tensors |= {f"optimizer/step/{name}": torch.tensor(float(step)) for name in SHAPES}
        save_file(tensors, path / shard_name(rank))
    layouts = {}
    for name, dim in split_dims(tp).items():
        shape = [size // tp if axis == dim else size for axis, size in enumerate(SHAPES[name])]
        layouts[name] = {"shape": shape, "split_dim": dim}
    state = {"step": step, "dp_size": dp_size, "tp": tp, "parameters": layouts}
    (path / STATE).write_text(json.dumps(state))
    files = {name: file_digest(path / name) for name in (STATE, *(shard_name(rank) for rank in range(dp_size * tp)))}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
    (folder / LATEST).write_text(path.name + "\n")
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "zero length": empty, "one bit": flip_a_bit, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [shard_name(0), shard_name(1), STATE, MANIFEST])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    older, newer = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    if name == MANIFEST and damage == "one bit":
        # In the middle of a hash: a manifest has no hash of its own, and needs none.
        content = (newer / MANIFEST).read_text()
        digest = file_digest(newer / shard_name(1))["sha256"]
        (newer / MANIFEST).write_text(content.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    else:
        DAMAGES[damage](newer / name)
    path, problems = newest_complete(tmp_path)
    assert path == older
    (problem,) = problems
    assert problem.startswith(f"{newer.name} is skipped: ")
    assert str(newer / (shard_name(1) if (name, damage) == (MANIFEST, "one bit") else name)) in problem
    with pytest.raises(CheckpointError):
        read_weights(newer)


def test_a_whole_checkpoint_has_no_problems(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 10)
    verify(path)
    assert newest_complete(tmp_path) == (path, [])


def test_nothing_there_is_no_checkpoint_and_no_problem(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "checkpoints") == (None, [])


def test_where_every_checkpoint_is_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(write_checkpoint(tmp_path, step) / shard_name(0))
    path, problems = newest_complete(tmp_path)
    assert path is None
    assert [problem.split()[0] for problem in problems] == [step_name(20), step_name(10)]


def test_unfinished_and_foreign_folders_do_not_count(tmp_path: Path) -> None:
    """A save that was killed before its rename, one that was killed in a deletion, and what others put there."""
    whole = write_checkpoint(tmp_path, 10)
    os.rename(write_checkpoint(tmp_path, 30), tmp_path / f".{step_name(30)}.tmp")
    os.rename(write_checkpoint(tmp_path, 40), tmp_path / f".{step_name(40)}.removed")
    for name in ("step_50", "step_000000050", "step_00000050.bak", "step_0000005x"):
        (tmp_path / name).mkdir()
    assert steps_on_disk(tmp_path) == [10]
    assert newest_complete(tmp_path) == (whole, [])


def test_latest_is_a_hint_and_never_believed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", 10)
    for text in (step_name(99), "", "\0", "../../elsewhere"):
        (tmp_path / "checkpoints" / LATEST).write_text(text)
        assert resolve_checkpoint(str(tmp_path), "source").name == step_name(10)
    (tmp_path / "checkpoints" / LATEST).unlink()
    assert resolve_checkpoint(str(tmp_path), "source").name == step_name(10)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 10)
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace(f'"format": {FORMAT}', '"format": 999'))
    with pytest.raises(CheckpointError, match=f"format 999, this version reads {FORMAT}"):
        verify(path)


@pytest.mark.parametrize("text", ["[]", "null", f'{{"format": {FORMAT}}}', f'{{"format": {FORMAT}, "files": [1]}}'])
def test_a_manifest_of_another_shape_is_a_damaged_one(tmp_path: Path, text: str) -> None:
    older, newer = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    (newer / MANIFEST).write_text(text)
    path, problems = newest_complete(tmp_path)
    assert path == older and len(problems) == 1


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    (tmp_path / f".{step_name(5)}.removed").mkdir()
    (tmp_path / f".{step_name(15)}.tmp").mkdir()
    remove_old(tmp_path, Retention(keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, step_name(30), step_name(40)]


def test_retention_never_removes_the_checkpoint_that_was_just_written(tmp_path: Path) -> None:
    """Newer folders are damaged ones that resuming skipped, or those of a run that was started afresh."""
    for step in (100, 110, 120):
        truncate(write_checkpoint(tmp_path, step) / shard_name(0))
    write_checkpoint(tmp_path, 90)
    written = write_checkpoint(tmp_path, 95)
    remove_old(tmp_path, Retention(keep=1), newest=95)
    assert newest_complete(tmp_path)[0] == written
    assert 90 not in steps_on_disk(tmp_path)


def give_metrics(path: Path, **metrics: float) -> None:
    rewrite_state(path, lambda state: state.update(metrics=metrics))


def test_retention_keeps_every_nth_and_the_best_too(tmp_path: Path) -> None:
    for step, loss in {10: 5.0, 20: 1.0, 30: 4.0, 40: 2.0, 50: 3.0, 60: 6.0}.items():
        give_metrics(write_checkpoint(tmp_path, step), loss=loss)
    rule = Retention(keep=1, keep_every=30, keep_best=2, best_metric="loss")
    assert remove_old(tmp_path, rule, newest=60) == [10, 50]
    assert steps_on_disk(tmp_path) == [60, 40, 30, 20]
    assert remove_old(tmp_path, Retention(keep=1, keep_best=1, best_metric="loss", best_mode="max")) == [20, 30, 40]


def test_among_equals_the_later_one_is_the_best(tmp_path: Path) -> None:
    assert Retention(keep=1, keep_best=1, best_metric="loss").kept({1: {"loss": 2.0}, 2: {"loss": 2.0}, 3: {}}) == {
        2,
        3,
    }


@pytest.mark.parametrize("name", [shard_name(1), STATE, MANIFEST])
def test_a_damaged_checkpoint_is_not_counted_and_not_removed(tmp_path: Path, name: str) -> None:
    """It would push out the only good one: here the run goes on from 10, and its next save finds 20 and 30 damaged."""
    for step in (10, 20, 30):
        give_metrics(write_checkpoint(tmp_path, step), loss=1.0 / step)
    for step in (20, 30):
        truncate(tmp_path / step_name(step) / name)
    write_checkpoint(tmp_path, 40)
    assert remove_old(tmp_path, Retention(keep=2, keep_best=1, best_metric="loss"), newest=40) == []
    assert steps_on_disk(tmp_path) == [40, 30, 20, 10]


def test_a_kill_between_the_two_renames_of_a_step_that_is_written_again(tmp_path: Path) -> None:
    """The damaged one is out of the way, the new one not yet in its place: the one before is used, and nothing is lost."""
    older = write_checkpoint(tmp_path, 10)
    os.rename(write_checkpoint(tmp_path, 20), tmp_path / f".{step_name(20)}.removed")
    os.rename(write_checkpoint(tmp_path, 20), tmp_path / f".{step_name(20)}.tmp")
    (tmp_path / LATEST).write_text(step_name(20))
    assert newest_complete(tmp_path) == (older, [])


def test_what_is_in_the_way_of_tidying_does_not_make_a_save_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    rmtree, stuck = shutil.rmtree, tmp_path / ".step_00000005.removed"
    stuck.mkdir()

    def busy(path: Path, *args: object, **options: object) -> None:
        if Path(path) == stuck:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    tidy(tmp_path, 20, Retention(keep=1), lambda phase: None)
    assert steps_on_disk(tmp_path) == [20] and (tmp_path / LATEST).read_text() == "step_00000020\n"
    assert not (tmp_path / ".step_00000010.removed").exists()  # the others are deleted all the same
    assert "step 20 is saved, but" in caplog.text and "Device or resource busy" in caplog.text


def test_a_file_with_the_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    (tmp_path / "step_00000077").touch()
    assert steps_on_disk(tmp_path) == [10]


def test_a_leftover_of_a_kill_does_not_stop_the_next_one(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / ".step_00000010.removed").mkdir()
    (tmp_path / ".step_00000010.removed" / "rank_00000.safetensors").touch()
    assert remove_old(tmp_path, Retention(keep=1)) == [10]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step_00000020"]


def test_processes_that_verify_together_find_what_one_finds(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 10, dp_size=4)
    flip_a_bit(path / shard_name(2))
    found = []
    for rank in range(3):
        try:
            verify(path, share=(rank, 3))
        except CheckpointError as error:
            found.append(str(error))
    (message,) = found
    assert shard_name(2) in message and "SHA-256" in message


def test_a_file_that_cannot_be_read_is_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails answers with an error, not with other bytes."""
    older, newer = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)

    def failing(path: Path) -> dict:
        if path == newer / shard_name(1):
            raise OSError(5, "Input/output error")
        return file_digest(path)

    monkeypatch.setattr("piflow_dist.checkpoint.files.file_digest", failing)
    path, (problem,) = newest_complete(tmp_path)
    assert path == older and "Input/output error" in problem and shard_name(1) in problem


# Snapshots


def mixed_tensors() -> dict[str, Tensor]:
    """Types of several widths in an order that would misalign them, a scalar, and an empty shard."""
    generator = torch.Generator().manual_seed(1)
    return {
        "b/half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "a/flag": torch.tensor([True, False, True]),
        "c/float": torch.randn(5, 3, generator=generator),
        "d/step": torch.tensor(7),
        "e/count": torch.tensor(3.0),
        "f/none": torch.empty(0),
        "g/part": torch.randn(20, generator=generator)[3:17:2],
    }


def test_a_snapshot_is_a_safetensors_file_of_what_was_there_when_it_was_taken(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    want = {name: value.clone() for name, value in tensors.items()}
    snapshot = Snapshot(page_locked=False)
    snapshot.take(tensors)
    for value in tensors.values():
        value.zero_()
    digest = snapshot.write(tmp_path / "one")
    assert {"size": snapshot.size, "sha256": digest} == file_digest(tmp_path / "one")
    found = load_file(tmp_path / "one")
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_snapshot_keeps_its_memory_and_follows_a_new_layout(tmp_path: Path) -> None:
    snapshot = Snapshot(page_locked=False)
    snapshot.take({"weight": torch.ones(4)})
    place = snapshot.buffer.data_ptr()
    snapshot.take({"weight": torch.full((4,), 2.0)})
    assert snapshot.buffer.data_ptr() == place
    snapshot.take({"weight": torch.full((4,), 3.0), "moment": torch.arange(6.0)})  # Adam's, after the first step
    snapshot.write(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found["weight"].tolist() == [3.0] * 4 and found["moment"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_write_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As os.write may do on a disk that fills up, or for more than 2 GB."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:7]))
    snapshot = Snapshot(page_locked=False)
    snapshot.take({"weight": torch.arange(50.0)})
    digest = snapshot.write(tmp_path / "file")
    assert load_file(tmp_path / "file")["weight"].tolist() == list(range(50))
    assert file_digest(tmp_path / "file")["sha256"] == digest


@pytest.mark.parametrize("saved_on", [1, 2, 3, 4])
@pytest.mark.parametrize("read_on", [1, 2, 3, 5, 8])
def test_slices_for_another_number_of_ranks(tmp_path: Path, saved_on: int, read_on: int) -> None:
    """Sizes of 15, 7, 1, 8 and 24 elements: uneven on most of these, and fewer than ranks on some."""
    path = write_checkpoint(tmp_path, 10, saved_on)
    for rank in range(read_on):
        loaded = load_checkpoint(path, rank, read_on)
        for seed, found in ((0, loaded.weights), (1, loaded.ema)):
            assert found.keys() == SHAPES.keys()
            for name, value in parameters(seed).items():
                assert torch.equal(found[name], shard_of(value, rank, read_on)), name
        for name, value in parameters(2).items():
            assert torch.equal(loaded.optimizer[f"exp_avg/{name}"], shard_of(value, rank, read_on)), name
            assert loaded.optimizer[f"step/{name}"].item() == 10
        assert loaded.state["step"] == 10


@pytest.mark.parametrize("saved_on", [(1, 1), (3, 1), (1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize("read_on", [(1, 1), (3, 1), (1, 2), (3, 2), (1, 4)])
def test_slices_for_another_tensor_parallel_size(
    tmp_path: Path, saved_on: tuple[int, int], read_on: tuple[int, int]
) -> None:
    """(dp, tp) of the run that saved, and of the one that goes on: a checkpoint of tp = 1 does not say what others split."""
    path = write_checkpoint(tmp_path, 10, *saved_on)
    dp_size, tp = read_on
    for rank in range(dp_size * tp):
        loaded = load_checkpoint(path, rank // tp, dp_size, rank % tp, tp, split_dims(tp))
        for seed, found in ((0, loaded.weights), (1, loaded.ema)):
            for name, value in parameters(seed).items():
                assert torch.equal(found[name], shard_of(value, rank, dp_size, name, tp)), name
        for name, value in parameters(2).items():
            assert torch.equal(loaded.optimizer[f"exp_avg/{name}"], shard_of(value, rank, dp_size, name, tp)), name


@pytest.mark.parametrize("saved_on", [(1, 1), (3, 1), (2, 2)])
def test_whole_parameters(tmp_path: Path, saved_on: tuple[int, int]) -> None:
    path = write_checkpoint(tmp_path, 10, *saved_on)
    for ema, seed in ((False, 0), (True, 1)):
        found, want = read_weights(path, ema), parameters(seed)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would run code when unpickled is an error, and the code does not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = write_checkpoint(tmp_path, 10, dp_size=1)
    (path / shard_name(0)).write_bytes(pickle.dumps(Bomb()))
    manifest = {"format": FORMAT, "files": {name: file_digest(path / name) for name in (STATE, shard_name(0))}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    verify(path)
    for read in (lambda: read_weights(path), lambda: load_checkpoint(path, 0, 1)):
        with pytest.raises(CheckpointError):
            read()
    assert not (tmp_path / "exploded").exists()


def test_write_atomic_leaves_the_old_text_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
