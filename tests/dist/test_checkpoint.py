"""Saves beside training, and what continues from them: on the same processes, on others, and where a write fails."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from ranks import run_ranks
from test_tensor_parallel import joined
from test_zero import DATAFREE, MIXED, TIED, Course, keep_weights, make_config, note
from torch.testing import assert_close

from piflow_dist.checkpoint.files import newest_complete, step_name, steps_on_disk, verify

# What the ranks do.

OPTIONS = (*TINY, "optim=adamw", "optim.lr=0.005", "optim.eps=1e-3", "optim.clip=0.05", "optim.clip_from_step=2")
STEPS, EACH = 8, 2
CHAIN = {"dp2 x tp2": (4, 2), "dp4": (4, 1), "one": (1, 1), "tp2": (2, 2)}
"""(processes, tp): each takes EACH steps from where the one before has saved."""
EXACT = {
    "tied-datafree-bf16": (*DATAFREE, *TIED, "train.dtype=bf16"),
    "full-bf16": (*MIXED, "train.dtype=bf16"),
    "tied-fp32": (*MIXED, *TIED),
    "full-datafree-fp32": DATAFREE,
}
SAVED_AT, LAST = 2, 4


@dataclass
class Outcome:
    """What one rank returns."""

    chain: Course | None = None
    from_start: Course | None = None
    """Resumed from a checkpoint of step 0."""
    whole: Course | None = None
    """The uninterrupted training."""
    uninterrupted: dict[str, Course] = field(default_factory=dict)
    resumed: dict[str, Course] = field(default_factory=dict)
    working: dict[str, bool] = field(default_factory=dict)
    """Whether the weights that the network computes with are, after loading, those that were there when saving."""
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    """{case: (step, message)}"""
    figures: dict[str, float] = field(default_factory=dict)
    due: list[bool] = field(default_factory=list)


def start(rank: int, world_size: int, tp: int = 1) -> Any:
    from datetime import timedelta

    from piflow_dist.parallel.topology import Topology

    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    return Topology(rank, world_size, rank, torch.device("cpu"), tp)


def options_for(topology: Any, *more: str) -> tuple[str, ...]:
    parallel = (f"launch.processes={topology.world_size}", f"parallel.tp={topology.tp}")
    return (*OPTIONS, *parallel, "train.micro_batch_size=1", f"train.steps={STEPS}", "checkpoint.keep=10", *more)


def advance(run: Any, course: Course, until: int) -> None:
    """The loop of train.py without its saves."""
    from piflow_dist import train

    while run.state.step < until:
        loss, result = train.train_step(run)
        run.state.step += 1
        run.ema.update(run.model.masters, run.state.step)
        note(course, loss.item(), result)
    keep_weights(course, run)


def chain_rank(rank: int, name: str, data: Path, teacher: Path, out: Path) -> Outcome:
    """This world's link of the chain, and two steps from a checkpoint of step 0."""
    from piflow_dist import train

    topology = start(rank, *CHAIN[name])
    position = list(CHAIN).index(name)
    outcome = Outcome(chain=Course(), from_start=Course())

    def build(folder: str) -> Any:
        return train.build_run(make_config(options_for(topology, *MIXED), data, teacher, out / folder), topology)

    run = build("chain")
    train.resume(run)
    assert run.state.step == position * EACH
    assert (run.parent is None) == (position == 0)
    advance(run, outcome.chain, run.state.step + EACH)
    train.save(run)

    run = build("step0")
    if position == 0:
        train.save(run)  # before the first step: Adam has no state yet
    else:
        train.resume(run)
        assert run.parent.endswith(step_name(0))
    advance(run, outcome.from_start, EACH)
    if CHAIN[name] == (1, 1):
        outcome.whole = Course()
        advance(build("whole"), outcome.whole, STEPS)
    return outcome


def exact_rank(rank: int, data: Path, teacher: Path, out: Path, small_disk: Path | None) -> Outcome:
    topology = start(rank, 2)
    outcome = Outcome()
    for name, options in EXACT.items():
        config = make_config(options_for(topology, *options), data, teacher, out / name)
        save_while_training(name, config, topology, outcome)
    config = make_config(
        options_for(topology, *EXACT["tied-fp32"], "checkpoint.every=1"), data, teacher, out / "broken"
    )
    fail_on_one_rank(config, topology, outcome)
    outcome.due = ask_the_clocks(topology, out)
    if small_disk is not None:
        options = (*EXACT["tied-fp32"], "checkpoint.every=1", "checkpoint.keep=100", f"train.steps={LAST}")
        fill_the_disk(
            make_config(options_for(topology, *options), data, teacher, small_disk / "run"), topology, outcome
        )
    return outcome


def save_while_training(name: str, config: Any, topology: Any, outcome: Outcome) -> None:
    """The writer gets its turn only when training is two steps further; then another run continues from what it wrote."""
    from piflow_dist import train

    go_on, course = threading.Event(), Course()
    run = train.build_run(config, topology)
    advance(run, course, SAVED_AT)
    working = working_weights(run)
    write = run.saver.snapshot.write

    def write_late(*args: Any) -> str:
        assert go_on.wait(300)
        return write(*args)

    run.saver.snapshot.write = write_late
    train.start_save(run)
    advance(run, course, LAST)
    assert not (run.saver.folder / step_name(SAVED_AT)).exists()
    go_on.set()
    outcome.figures = run.saver.wait()
    outcome.uninterrupted[name], outcome.resumed[name] = course, Course()

    again = train.build_run(config, topology)
    torch.manual_seed(rank_seed := 1000 + topology.rank)  # a process that continues has drawn other numbers before
    np.random.seed(rank_seed)
    train.resume(again)
    found = working_weights(again)
    assert found.keys() == working.keys()
    outcome.working[name] = all(torch.equal(found[key], working[key]) for key in working)
    advance(again, outcome.resumed[name], LAST)


def working_weights(run: Any) -> dict[str, torch.Tensor]:
    """This rank's part of what forward computes with (bf16 where the training is), the trained ones."""
    found = {}
    for name, parameter in run.model.engine.module.named_parameters():
        if parameter.requires_grad:
            value = parameter.ds_tensor if parameter.ds_status.name == "NOT_AVAILABLE" else parameter
            found[name] = value.detach().clone()
    assert {value.dtype for value in found.values()} == {
        torch.bfloat16 if run.config.train.dtype == "bf16" else torch.float32
    }
    return found


def ask_the_clocks(topology: Any, out: Path) -> list[bool]:
    """Whether to save after steps 1 to 4: nothing is due, rank 1's hour is up, rank 0's is, a fourth step."""
    from piflow_dist.checkpoint.saver import CheckpointSaver
    from piflow_dist.config import CheckpointConfig

    saver = CheckpointSaver(out / "clocks", topology, CheckpointConfig(every=4, every_minutes=60))
    due = [saver.at_boundary(1)[0]]
    for rank in (1, 0):
        saver.began -= 3601 if topology.rank == rank else 0
        due.append(saver.at_boundary(2)[0])
    saver.began = time.monotonic()
    return [*due, saver.at_boundary(4)[0]]


def fail_on_one_rank(config: Any, topology: Any, outcome: Outcome) -> None:
    """Rank 1 cannot write its shard of step 2."""
    from piflow_dist import train

    run = train.build_run(config, topology)
    write = run.saver.snapshot.write

    def write_or_fail(path: Path, *args: Any) -> str:
        if topology.rank == 1 and step_name(2) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return write(path, *args)

    run.saver.snapshot.write = write_or_fail
    outcome.failures["one rank"] = train_to_failure(run)


def fill_the_disk(config: Any, topology: Any, outcome: Outcome) -> None:
    """Saves at every step until the disk is full; then room is made and the same training goes on to its end."""
    import torch.distributed as dist

    from piflow_dist import train

    folder = Path(config.run_dir)
    if topology.is_main:
        folder.mkdir()
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "ballast").write_bytes(bytes(free - ROOM))
    dist.barrier()
    outcome.failures["full disk"] = train_to_failure(train.build_run(config, topology))
    if topology.is_main:
        path, problems = newest_complete(folder / "checkpoints")
        assert path is not None and not problems, problems
        assert not list((folder / "checkpoints").glob(".*")), "an unfinished save takes room on a full disk"
        (folder / "ballast").unlink()
    dist.barrier()
    run = train.build_run(config, topology)
    train.resume(run)
    assert 1 <= run.state.step < LAST
    train.train(run, None)
    outcome.resumed["full disk"] = Course()
    keep_weights(outcome.resumed["full disk"], run)


ROOM = 1 << 20
"""Bytes for checkpoints of some 0.3 MB each."""


def train_to_failure(run: Any) -> tuple[int, str]:
    from piflow_dist import train

    try:
        train.train(run, None)
    except OSError as error:
        return run.state.step, str(error)
    raise AssertionError("the training did not stop")


# What the tests see.


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A tmpfs of 8 MB; None where mounting is not allowed."""
    folder = tmp_path_factory.mktemp("small_disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def worlds(tiny_data: Path, teacher_run: Path, out: Path) -> dict[str, list[Outcome]]:
    return {
        name: run_ranks(chain_rank, size, name, tiny_data, teacher_run, out, time_limit=420)
        for name, (size, _) in CHAIN.items()
    }


@pytest.fixture(scope="module")
def pair(tiny_data: Path, teacher_run: Path, out: Path, small_disk: Path | None) -> list[Outcome]:
    return run_ranks(exact_rank, 2, tiny_data, teacher_run, out, small_disk, time_limit=420)


def test_a_training_that_moves_from_world_to_world_has_the_losses_of_one_that_stays(
    worlds: dict[str, list[Outcome]],
) -> None:
    """EMA starts on the way (ema.start_step=3), and so does clipping; sizes are uneven."""
    whole = worlds["one"][0].whole
    assert any(np.prod(shape) % 4 for shape in whole.shapes.values())
    for position, (name, ranks) in enumerate(worlds.items()):
        steps = slice(position * EACH, (position + 1) * EACH)
        for rank in ranks:
            assert_close(
                rank.chain.losses, whole.losses[steps], rtol=1e-5, atol=0, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert_close(rank.chain.norms, whole.norms[steps], rtol=1e-5, atol=0)
    for kind in ("shards", "ema"):
        found, want = joined([rank.chain for rank in worlds["tp2"]], 2, kind), joined([whole], 1, kind)
        assert found.keys() == want.keys()
        for name in want:
            assert_close(found[name], want[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any(not np.array_equal(whole.ema[name], whole.shards[name]) for name in whole.ema)  # not just a copy


def test_a_checkpoint_of_step_0_gives_the_first_steps_everywhere(worlds: dict[str, list[Outcome]]) -> None:
    whole = worlds["one"][0].whole
    for ranks in worlds.values():
        for rank in ranks:
            assert_close(rank.from_start.losses, whole.losses[:EACH], rtol=1e-5, atol=0)
            assert_close(rank.from_start.norms, whole.norms[:EACH], rtol=1e-5, atol=0)


def test_every_world_says_where_it_came_from(worlds: dict[str, list[Outcome]], out: Path) -> None:
    from piflow_dist.checkpoint.files import STATE, read_json

    folder = out / "chain" / "checkpoints"
    steps = steps_on_disk(folder)[::-1]
    parents = [read_json(folder / step_name(step) / STATE)["parent"] for step in steps]
    assert steps == [2, 4, 6, 8]
    assert parents == [None, *(str(folder / step_name(step)) for step in steps[:-1])]


@pytest.mark.parametrize("name", EXACT)
def test_what_is_saved_is_the_boundary_though_training_went_on(pair: list[Outcome], name: str) -> None:
    """Losses, norms, weights, averages: bit for bit on the same processes, fp32 and bf16, with dropout, whatever was drawn before."""
    for rank in pair:
        assert rank.working[name]
        want, found = rank.uninterrupted[name], rank.resumed[name]
        assert found.losses == want.losses[SAVED_AT:] and found.norms == want.norms[SAVED_AT:]
        for kind in ("shards", "ema"):
            ours, theirs = getattr(found, kind), getattr(want, kind)
            assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_minutes_are_those_of_process_0_and_all_agree(pair: list[Outcome]) -> None:
    for rank in pair:
        assert rank.due == [False, False, True, True]


def test_the_figures_of_a_save(pair: list[Outcome], out: Path) -> None:
    """Bytes are those of all ranks' files."""
    folder = out / list(EXACT)[-1] / "checkpoints" / step_name(SAVED_AT)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for rank in pair:
        assert rank.figures["checkpoint_bytes"] == size
        assert 0 < rank.figures["checkpoint_stall"] < rank.figures["checkpoint_write_seconds"] + 60


def test_a_rank_that_cannot_write_stops_all_at_the_next_boundary(pair: list[Outcome], out: Path) -> None:
    (step, message), (step_1, message_1) = (rank.failures["one rank"] for rank in pair)
    assert step == step_1 == 3
    assert "Checkpoint of step 2 could not be written" in message and "process 1 failed, see its log" in message
    assert "Read-only file system" in message_1 and "Older checkpoints are as they were" in message_1
    folder = out / "broken" / "checkpoints"
    assert steps_on_disk(folder) == [1]
    verify(folder / step_name(1))
    assert not list(folder.glob(".*"))


def test_a_full_disk_stops_the_run_and_loses_nothing(pair: list[Outcome], small_disk: Path | None) -> None:
    """The ranks check that the checkpoint before is whole; with room again the same training comes to the same end."""
    if small_disk is None:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    messages = [rank.failures["full disk"] for rank in pair]
    assert len({step for step, _ in messages}) == 1
    assert any("No space left on device" in message for _, message in messages)
    for rank in pair:
        found, want = rank.resumed["full disk"].shards, rank.uninterrupted["tied-fp32"].shards
        assert all(np.array_equal(found[key], want[key]) for key in want)
