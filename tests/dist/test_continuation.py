"""The same run folder again: what may change, what is refused, and what becomes of an earlier training."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import STUDENT, STUDENT_STEPS, TEACHER, TEACHER_STEPS, read_weights, rewrite_state, run_tool

from piflow_dist.checkpoint.files import STATE, newest_complete, read_json, steps_on_disk, verify
from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
from piflow_dist.config import load_config
from piflow_dist.launch.continuation import check_continuation, describe_continuation, keep_micro_batch, set_aside
from piflow_dist.tracking.tracker import read_metrics, read_run_id
from piflow_dist.version import code_version


@pytest.fixture
def run_dir(student_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished student of 4 NFE."""
    return Path(shutil.copytree(student_run, tmp_path / "runs" / "student"))


@pytest.fixture
def options(tiny_data: Path, teacher_run: Path, run_dir: Path) -> list[str]:
    return [*STUDENT, f"data.root={tiny_data}", f"distill.teacher={teacher_run}", f"run_dir={run_dir}"]


@pytest.fixture
def refuse(refused_by: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return refused_by("launch")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "change, named",
    [
        ("distill.nfe=2", "distill.nfe=2 (was 4)"),
        ("policy.num_components=2", "policy.num_components=2 (was 3)"),
        ("distill.guidance.scale=3", "distill.guidance.scale=3.0 (was 2.0)"),
        ("objective=imitation_datafree", "objective=imitation_datafree (was imitation)"),
        ("train.seed=8", "train.seed=8 (was 7)"),
        ("train.batch_size=2", "train.batch_size=2 (was 4)"),
        ("train.dtype=bf16", "train.dtype=bf16 (was fp32)"),
        ("optim.type=sgd", "optim.type=sgd (was adamw)"),
    ],
)
def test_another_training_in_the_same_folder(
    refuse: Callable[..., str], options: list[str], run_dir: Path, change: str, named: str
) -> None:
    before = contents(run_dir)
    message = refuse(*options, change)
    assert named in message and f"step {STUDENT_STEPS}" in message
    assert "another run_dir" in message and "checkpoint.resume=false" in message
    assert contents(run_dir) == before


def test_other_data_under_the_same_settings(
    refuse: Callable[..., str], options: list[str], run_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    checkpoint = newest_complete(run_dir / "checkpoints")[0]
    rewrite_state(checkpoint, lambda state: state["data"].update(dataset="0" * 64))
    message = refuse(*options, f"data.root={moved}")
    assert f"data.root={moved}" in message and "is not the data" in message and "000000000000" in message


def test_another_teacher_under_the_same_path(refuse: Callable[..., str], options: list[str], run_dir: Path) -> None:
    rewrite_state(newest_complete(run_dir / "checkpoints")[0], lambda state: state.update(teacher="0" * 64))
    message = refuse(*options)
    assert "distill.teacher=" in message and "is not the teacher" in message and "000000000000" in message


def test_a_teacher_of_another_codec(
    refuse: Callable[..., str], options: list[str], teacher_run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher_run, tmp_path / "other"))
    rewrite_state(
        newest_complete(other / "checkpoints")[0], lambda state: state["trained_on"]["codec"].update(scale=2.0)
    )
    message = refuse(*options, f"distill.teacher={other}", f"run_dir={tmp_path / 'new'}")
    assert "codec" in message and "'scale': 2.0" in message and "Prepare the data" in message


def test_the_folder_of_the_teacher(
    refuse: Callable[..., str], options: list[str], teacher_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(teacher_run, tmp_path / "copy"))
    before = contents(copy)
    for way in (str(copy), f"{copy}/checkpoints/../", str(copy / "checkpoints")):
        message = refuse(*options, f"run_dir={way}", f"distill.teacher={copy}", "checkpoint.resume=false")
        assert "is the folder of distill.teacher" in message and "another run_dir" in message
    assert contents(copy) == before


def test_only_damaged_checkpoints(refuse: Callable[..., str], options: list[str], run_dir: Path) -> None:
    for step in steps_on_disk(run_dir / "checkpoints"):
        (run_dir / "checkpoints" / f"step_{step:08d}" / "rank_00000.safetensors").write_bytes(b"cut")
    message = refuse(*options)
    assert "none that can be continued" in message and "has 3 bytes instead of" in message


def test_nothing_is_written_before_everything_was_checked(
    refuse: Callable[..., str], options: list[str], run_dir: Path
) -> None:
    before = contents(run_dir)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = f"launch.port={holder.getsockname()[1]}"
        for wrong in (("launch.processes=4", "launch.device=cuda"), (taken, "optim.lr=0.5")):
            refuse(*options, *wrong, "checkpoint.resume=false")
    assert contents(run_dir) == before


def test_a_learning_rate_may_change_and_longer_training_goes_on(options: list[str], run_dir: Path) -> None:
    done = run_tool("launch", *options, "train.steps=6", "optim.lr=0.02", "launch.processes=2")
    assert done.returncode == 0, done.stdout
    assert f"goes on from step {STUDENT_STEPS} of 6" in done.stdout
    assert f"changed since step {STUDENT_STEPS}: optim.lr: 0.01 -> 0.02" in done.stdout
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_starting_afresh_keeps_the_earlier_training(options: list[str], run_dir: Path, student_run: Path) -> None:
    """Its newest step is later than any of the new one's, which must be the ones that are continued and sampled."""
    before = {name: data for name, data in contents(run_dir).items() if not name.startswith(".")}
    done = run_tool("launch", *options, "checkpoint.resume=false", "distill.nfe=2", "train.steps=2")
    assert done.returncode == 0, done.stdout
    earlier = run_dir / "previous_1"
    assert f"the earlier training is kept in {earlier}" in done.stdout
    kept = contents(earlier)
    assert {name: kept.get(name) for name in before} == before
    assert resolve_checkpoint(str(run_dir), "source").name == "step_00000002"
    assert read_run_config(resolve_checkpoint(str(run_dir), "source")).distill.nfe == 2
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    wanted, found = (read_weights(resolve_checkpoint(str(run), "source")) for run in (student_run, earlier))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = run_tool("launch", *options, "distill.nfe=2", "train.steps=4")
    assert "goes on from step 2 of 4" in again.stdout and again.returncode == 0, again.stdout
    for step in steps_on_disk(run_dir / "checkpoints"):
        verify(run_dir / "checkpoints" / f"step_{step:08d}")


def going_back(options: list[str], chosen: object) -> tuple[list[str], Path | None]:
    """What tools/launch.py says and sets aside for checkpoint.resume=`chosen`, without the training that would follow."""
    config = load_config([*options, f"checkpoint.resume={chosen}"])
    check_continuation(config)
    return describe_continuation(config), set_aside(config)


def test_going_back_to_a_step_gives_the_same_training_and_keeps_the_later_one(
    options: list[str], run_dir: Path, student_run: Path
) -> None:
    later = contents(run_dir / "checkpoints" / "step_00000004")
    done = run_tool("launch", *options, "checkpoint.resume=2")
    assert done.returncode == 0, done.stdout
    aside = run_dir / "previous_1"
    assert f"goes back to step 2 of {STUDENT_STEPS}" in done.stdout
    assert f"checkpoint.resume=2: the later checkpoints are kept in {aside}" in done.stdout
    assert contents(aside / "checkpoints" / "step_00000004") == later
    assert [row["step"] for row in read_metrics(aside / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (aside / "mlflow_run_id").read_text() != (run_dir / "mlflow_run_id").read_text()
    rows, wanted = (read_metrics(run / "metrics.jsonl") for run in (run_dir, student_run))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in wanted]
    newest = run_dir / "checkpoints" / "step_00000004"
    weights, wanted = (read_weights(path) for path in (newest, student_run / "checkpoints" / newest.name))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    state = json.loads((newest / "state.json").read_text())
    assert state["parent"] == str(run_dir / "checkpoints" / "step_00000002")
    assert state["metrics"]["loss"] == rows[-1]["loss"] and state["metrics"]["grad_norm"] == rows[-1]["grad_norm"]


def test_going_back_to_the_newest_step_sets_nothing_aside(options: list[str], run_dir: Path) -> None:
    before = contents(run_dir)
    lines, aside = going_back(options, STUDENT_STEPS)
    assert aside is None and f"is at step {STUDENT_STEPS} already" in lines[0]
    assert contents(run_dir) == before


def test_a_checkpoint_that_lies_elsewhere_becomes_the_runs_own(
    options: list[str], run_dir: Path, tmp_path: Path
) -> None:
    before = contents(run_dir)
    moved = Path(shutil.copytree(run_dir / "checkpoints" / "step_00000002", tmp_path / "backup" / "of_monday"))
    lines, aside = going_back(options, moved)
    assert "goes back to step 2" in lines[0]
    assert steps_on_disk(run_dir / "checkpoints") == [2] and steps_on_disk(aside / "checkpoints") == [4, 2]
    assert contents(run_dir / "checkpoints" / "step_00000002") == contents(moved)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000002\n"
    found = contents(run_dir)
    assert all(
        data in found.values() for name, data in before.items() if not name.endswith("latest")
    )  # nothing is lost
    # What is set aside is a run folder: its checkpoints can be gone back to in turn. Here none is later, or at that step.
    assert going_back(options, aside / "checkpoints" / "step_00000004")[1] is None
    assert steps_on_disk(run_dir / "checkpoints") == [4, 2]


def test_checkpoints_that_cannot_be_gone_back_to(
    refuse: Callable[..., str], options: list[str], run_dir: Path, tmp_path: Path
) -> None:
    before = contents(run_dir)
    assert "has no such step. There are: 2, 4." in refuse(*options, "checkpoint.resume=3")
    assert f"checkpoint.resume={tmp_path / 'no'} does not exist" in refuse(
        *options, f"checkpoint.resume={tmp_path / 'no'}"
    )
    assert "distill.nfe=2 (was 4)" in refuse(*options, "checkpoint.resume=2", "distill.nfe=2")
    assert contents(run_dir) == before
    shard = run_dir / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    message = refuse(*options, "checkpoint.resume=2")
    assert f"{shard} is damaged" in message and "Choose another one" in message


def test_a_checkpoint_says_what_wrote_it(run_dir: Path, tmp_path: Path) -> None:
    """config.yaml beside it may be gone or of a later attempt."""
    (run_dir / "config.yaml").unlink()
    checkpoint = newest_complete(run_dir / "checkpoints")[0]
    moved = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name))
    config = read_run_config(moved)
    assert (config.distill.nfe, config.policy.num_components, config.train.steps) == (4, 3, STUDENT_STEPS)
    assert json.loads((moved / "state.json").read_text())["trained_on"]["codec"]["kind"] == "block_dct"


def test_a_damaged_newest_checkpoint_is_named_where_an_older_one_is_taken(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = newest_complete(run_dir / "checkpoints")[0]
    (newest / "rank_00000.safetensors").write_bytes(b"cut")
    older = resolve_checkpoint(str(run_dir), "distill.teacher")
    assert older.name < newest.name
    assert newest.name in caplog.text and "has 3 bytes" in caplog.text and f"Using {older.name}" in caplog.text


def flip_a_bit(checkpoint: Path) -> None:
    shard = checkpoint / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)


def test_a_run_whose_checkpoints_are_all_damaged_inside_does_not_start_afresh(
    options: list[str], run_dir: Path
) -> None:
    """Sizes fit, so only the processes, which read the hashes, can see it."""
    for step in steps_on_disk(run_dir / "checkpoints"):
        flip_a_bit(run_dir / "checkpoints" / f"step_{step:08d}")
    before = contents(run_dir / "checkpoints") | {"metrics": (run_dir / "metrics.jsonl").read_bytes()}
    done = run_tool("launch", *options, f"train.steps={STUDENT_STEPS + 1}")
    assert done.returncode == 1 and "none that can be continued" in done.stdout
    assert done.stdout.count("SHA-256 differs") >= 2 and "checkpoint.resume=false" in done.stdout
    assert contents(run_dir / "checkpoints") | {"metrics": (run_dir / "metrics.jsonl").read_bytes()} == before


def test_another_number_of_processes_has_the_same_losses_with_no_option_given(
    teacher_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two processes trained in micro-batches of 4 images: one goes on in such pieces, not in one of 8."""
    run_dir = Path(shutil.copytree(teacher_run, tmp_path / "runs" / "teacher"))
    shutil.rmtree(run_dir / "checkpoints" / f"step_{TEACHER_STEPS:08d}")
    done = run_tool("launch", *TEACHER, f"data.root={tiny_data}", f"run_dir={run_dir}", "launch.processes=1")
    assert done.returncode == 0, done.stdout
    assert "train.micro_batch_size=4, as before" in done.stdout
    found, want = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, teacher_run))
    assert len(found) == TEACHER_STEPS
    for key in ("loss", "grad_norm"):
        for row, wanted in zip(found, want, strict=True):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), (key, row["step"])


def test_pieces_that_cannot_be_kept_are_told(options: list[str], run_dir: Path) -> None:
    config = load_config([*options, "launch.processes=2"])  # the student's 4 images were one piece
    (said,) = keep_micro_batch(config)
    assert "Micro-batches of 2 images instead of 4" in said and config.train.micro_batch_size is None
    config = load_config([*options, "train.micro_batch_size=4"])
    assert keep_micro_batch(config) == []


def test_a_checkpoint_says_which_code_and_which_mlflow_run_it_is_of(run_dir: Path) -> None:
    state = read_json(resolve_checkpoint(str(run_dir), "x") / STATE)
    assert state["code"] == code_version()
    assert state["mlflow_run"] == (run_dir / "mlflow_run_id").read_text().strip()


def test_the_last_saves_figures_are_in_mlflow(run_dir: Path, student_run: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{student_run.parent / 'mlflow.db'}")
    history = client.get_metric_history(read_run_id(student_run), "checkpoint_stall")
    assert [metric.step for metric in history][-1] == STUDENT_STEPS
