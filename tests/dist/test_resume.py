"""tools/launch.py as a user meets it: kills, Ctrl-C, damaged checkpoints and requests that cannot work.

One run is interrupted in every way below, each time continued by the same command, and must end as the run of the
`teacher_run` fixture, which was never interrupted.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPO, STUDENT, TEACHER, TEACHER_STEPS, read_weights, rewrite_state

from piflow_dist.checkpoint.files import LATEST, newest_complete, steps_on_disk, verify
from piflow_dist.launch.local import describe
from piflow_dist.tracking.tracker import read_metrics

PATIENCE = 240.0
"""Seconds for anything that has to happen; nothing is measured."""


@dataclass
class Interruption:
    """How a launch ended, and what it left."""

    exit_code: int
    output: str
    steps_done: int
    survivors: list[int]


class Launch:
    """A running tools/launch.py, in a session of its own so that a signal to its group reaches nobody else."""

    def __init__(self, run_dir: Path, log: Path, *arguments: str):
        self.run_dir, self.log = run_dir, log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(REPO / "tools" / "launch.py"), *arguments, f"run_dir={run_dir}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s: {self.log.read_text()}"
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: steps_done(self.run_dir) >= step, f"step {step}")

    def wait_for_workers(self, count: int) -> None:
        self.wait_until(lambda: len(self.workers()) >= count, f"{count} workers")

    def workers(self) -> list[int]:
        """Process ids of this run's workers in order of rank, whoever their parent is by now."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and is_worker(folder, self.run_dir):
                found[int(folder.name)] = rank_of(folder)
        return sorted(found, key=lambda pid: found[pid])

    def end(self) -> Interruption:
        exit_code = self.process.wait(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.workers() and time.monotonic() < deadline:
            time.sleep(0.05)
        return Interruption(exit_code, self.log.read_text(), steps_done(self.run_dir), self.workers())

    def stop(self) -> None:
        for pid in (*self.workers(), self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def is_worker(folder: Path, run_dir: Path) -> bool:
    try:
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return "piflow_dist.train" in words and any(word.startswith(str(run_dir)) for word in words)


def rank_of(folder: Path) -> int:
    try:
        variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return -1
    return next((int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")), -1)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def assert_whole_checkpoints_only(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for step in steps_on_disk(folder):
        verify(folder / f"step_{step:08d}")


def assert_same_course(run_dir: Path, reference: Path) -> None:
    """Losses, gradient norms, learning rates, weights and their average, bit for bit."""
    found, want = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, reference))
    assert [row["step"] for row in found] == [row["step"] for row in want]
    for key in ("loss", "grad_norm", "lr", "ema_decay", "skipped"):
        assert [row[key] for row in found] == [row[key] for row in want], key
    for ema in (False, True):
        weights, wanted = (read_weights(newest(folder), ema) for folder in (run_dir, reference))
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def newest(run_dir: Path) -> Path:
    path, problems = newest_complete(run_dir / "checkpoints")
    assert path is not None and not problems, problems
    return path


@pytest.fixture(scope="module")
def arguments(tiny_data: Path) -> list[str]:
    return [*TEACHER, f"data.root={tiny_data}"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume") / "interrupted"


@pytest.fixture(scope="module")
def interrupted(run_dir: Path, arguments: list[str]) -> Iterator[dict[str, Interruption]]:
    """The ways in which one run was ended, in this order; the last launch reaches the end."""
    ends: dict[str, Interruption] = {}
    launches: list[Launch] = []

    def launch(name: str) -> Launch:
        launches.append(Launch(run_dir, run_dir.parent / f"{name}.log", *arguments))
        return launches[-1]

    try:
        started = launch("launcher killed at start")
        started.wait_for_workers(2)
        os.kill(started.process.pid, signal.SIGKILL)
        ends["launcher killed at start"] = started.end()

        started = launch("worker killed")
        saving = run_dir / "checkpoints" / ".step_00000008.tmp"
        started.wait_until(lambda: saving.exists() or steps_done(run_dir) > 10, "save of step 8")
        os.kill(started.workers()[1], signal.SIGKILL)
        ends["worker killed"] = started.end()
        assert_whole_checkpoints_only(run_dir)
        leave_unfinished_save(run_dir / "checkpoints", 16)

        started = launch("interrupted")
        started.wait_for_step(19)
        os.killpg(started.process.pid, signal.SIGINT)
        ends["interrupted"] = started.end()
        assert_whole_checkpoints_only(run_dir)

        started = launch("launcher killed")
        started.wait_for_step(27)
        os.kill(started.process.pid, signal.SIGKILL)
        ends["launcher killed"] = started.end()
        assert_whole_checkpoints_only(run_dir)
        damage_newest(run_dir)

        ends["finished"] = launch("finished").end()
        yield ends
    finally:
        for started in launches:
            started.stop()


def leave_unfinished_save(folder: Path, step: int) -> None:
    """What a kill leaves behind in the middle of a save: a temporary folder with a whole and a cut shard."""
    temporary = folder / f".step_{step:08d}.tmp"
    temporary.mkdir(parents=True)
    (temporary / "rank_00000.safetensors").write_bytes(b"\0" * 100)
    (temporary / "rank_00001.safetensors").write_bytes(b"")


def damage_newest(run_dir: Path) -> None:
    shard = newest(run_dir) / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)


def test_a_killed_worker_ends_the_run_with_rank_and_signal(interrupted: dict[str, Interruption]) -> None:
    end = interrupted["worker killed"]
    assert end.exit_code == 1
    assert "Process 1 was ended by SIGKILL" in end.output
    assert "error: " in end.output and "Logs: " in end.output
    assert end.steps_done < TEACHER_STEPS


def test_of_processes_found_dead_together_the_killed_one_is_named() -> None:
    """The other one failed because of it, but is the first in the list, with an earlier time."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {0: ProcessFailure(0, 10, 1, "no file"), 1: ProcessFailure(1, 11, -signal.SIGKILL, "no file")}
    assert "Process 1 was ended by SIGKILL" in describe(ChildFailedError("train", failures), Path("logs"))


@pytest.mark.parametrize("how", ["launcher killed at start", "worker killed", "interrupted", "launcher killed"])
def test_nothing_is_left_running(interrupted: dict[str, Interruption], how: str) -> None:
    assert interrupted[how].survivors == []


def test_ctrl_c_has_its_exit_code_and_says_how_to_go_on(interrupted: dict[str, Interruption]) -> None:
    end = interrupted["interrupted"]
    assert end.exit_code == 130
    assert "The same command goes on from what is finished" in end.output
    assert f"stopped by SIGTERM after step {end.steps_done}, with a checkpoint" in end.output
    assert 19 <= end.steps_done < TEACHER_STEPS


def test_the_launcher_was_killed_on_the_way(interrupted: dict[str, Interruption]) -> None:
    assert interrupted["launcher killed at start"].exit_code == -signal.SIGKILL
    assert interrupted["launcher killed at start"].steps_done == 0
    assert interrupted["launcher killed"].exit_code == -signal.SIGKILL
    assert 27 <= interrupted["launcher killed"].steps_done < TEACHER_STEPS


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(interrupted: dict[str, Interruption]) -> None:
    output = interrupted["finished"].output
    assert interrupted["finished"].exit_code == 0, output
    damaged = next(line for line in output.splitlines() if "is skipped" in line)
    assert "rank_00001.safetensors is damaged" in damaged
    skipped = int(damaged.split("step_")[1][:8])
    assert f"continuing from {REPO}" not in output
    continued = next(line for line in output.splitlines() if "continuing from" in line)
    assert skipped - 8 <= int(continued.split("step_")[1][:8]) < skipped


def test_the_interrupted_run_equals_the_uninterrupted_one(
    interrupted: dict[str, Interruption], run_dir: Path, teacher_run: Path
) -> None:
    assert interrupted["finished"].exit_code == 0, interrupted["finished"].output
    assert_same_course(run_dir, teacher_run)


def test_what_the_run_leaves(interrupted: dict[str, Interruption], run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    assert_whole_checkpoints_only(run_dir)
    assert (folder / LATEST).read_text().strip() == f"step_{TEACHER_STEPS:08d}"
    assert len(steps_on_disk(folder)) == 3  # checkpoint.keep
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_mlflow_has_one_run_with_every_step_once(interrupted: dict[str, Interruption], run_dir: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "piflow_dist"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert sorted((metric.step, metric.value) for metric in history) == [(row["step"], row["loss"]) for row in rows]


# Requests that cannot work: refused before a process starts, exit code 2, value and option in the message.


@pytest.fixture
def refuse(refused_by: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return refused_by("launch")


def test_a_port_in_use(refuse: Callable[..., str], arguments: list[str], tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        message = refuse(*arguments, f"run_dir={tmp_path / 'run'}", f"launch.port={port}")
    assert f"launch.port={port} cannot be used" in message and "launch.port=0" in message


@pytest.mark.parametrize("place", ["below a file", "/proc"])
def test_a_run_folder_that_cannot_be_written(
    refuse: Callable[..., str], arguments: list[str], tmp_path: Path, place: str
) -> None:
    """Root may write anywhere that permissions forbid, so these are places where nobody can."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if place == "below a file" else Path("/proc/run")
    assert f"run_dir={folder} cannot be written" in refuse(*arguments, f"run_dir={folder}")


def test_a_folder_that_refuses_files(
    refuse: Callable[..., str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    message = refuse(*arguments, f"run_dir={tmp_path / 'run'}")
    assert "Read-only file system" in message and "Choose another run_dir" in message


def test_missing_data(refuse: Callable[..., str], tmp_path: Path) -> None:
    message = refuse(*TEACHER, f"data.root={tmp_path / 'nowhere'}", f"run_dir={tmp_path / 'run'}")
    assert f"data.root={tmp_path / 'nowhere'}" in message and "tools/prepare_data.py" in message


def test_data_of_another_model(refuse: Callable[..., str], arguments: list[str], tmp_path: Path) -> None:
    message = refuse(*arguments, f"run_dir={tmp_path / 'run'}", "model.joint_attention_dim=32")
    assert "width 64" in message and "model.joint_attention_dim=32" in message


def test_a_split_that_is_not_there(refuse: Callable[..., str], arguments: list[str], tmp_path: Path) -> None:
    message = refuse(*arguments, f"run_dir={tmp_path / 'run'}", "data.split=dev")
    assert "data.split=dev" in message and "test, train" in message


def test_a_teacher_that_is_not_there_or_not_whole(
    refuse: Callable[..., str], tiny_data: Path, teacher_run: Path, tmp_path: Path
) -> None:
    options = (*STUDENT, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}")
    nowhere = tmp_path / "nowhere"
    assert f"distill.teacher={nowhere} does not exist" in refuse(*options, f"distill.teacher={nowhere}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no complete checkpoint" in refuse(*options, f"distill.teacher={empty}")
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher_run, damaged)
    for step in steps_on_disk(damaged / "checkpoints"):
        (damaged / "checkpoints" / f"step_{step:08d}" / "rank_00000.safetensors").write_bytes(b"cut")
    message = refuse(*options, f"distill.teacher={damaged}")
    assert "no complete checkpoint" in message and "rank_00000.safetensors has 3 bytes instead of" in message


def test_a_teacher_of_another_model_or_without_an_unconditional_velocity(
    refuse: Callable[..., str], tiny_data: Path, teacher_run: Path, tmp_path: Path
) -> None:
    options = (*STUDENT, f"data.root={tiny_data}", f"run_dir={tmp_path / 'run'}")
    assert "same model group" in refuse(*options, f"distill.teacher={teacher_run}", "model.num_layers=3")
    conditional = tmp_path / "conditional"
    shutil.copytree(teacher_run, conditional)
    rewrite_state(newest(conditional), lambda state: state["config"]["data"].update(caption_dropout=0.0))
    message = refuse(*options, f"distill.teacher={conditional}")
    assert "distill.guidance.scale=2.0" in message and "distill.guidance.scale=1" in message


def test_more_images_per_step_than_the_data_has(
    refuse: Callable[..., str], arguments: list[str], tmp_path: Path
) -> None:
    message = refuse(*arguments, f"run_dir={tmp_path / 'run'}", "train.batch_size=64")
    assert "40 samples" in message and "train.batch_size=64" in message


def test_a_dry_run_starts_and_changes_nothing(arguments: list[str], teacher_run: Path, tmp_path: Path) -> None:
    from conftest import run_tool

    before = (teacher_run / "config.yaml").read_text()
    done = run_tool("launch", *arguments, f"run_dir={teacher_run}", "launch.dry_run=true", "optim.lr=0.1")
    assert done.returncode == 0, done.stdout
    assert f"goes on from step {TEACHER_STEPS} of {TEACHER_STEPS}" not in done.stdout and "nothing to do" in done.stdout
    assert "optim.lr: 0.005 -> 0.1" in done.stdout and "Everything checked" in done.stdout
    assert (teacher_run / "config.yaml").read_text() == before
    assert json.loads((teacher_run / "checkpoints" / f"step_{TEACHER_STEPS:08d}" / "state.json").read_text())
