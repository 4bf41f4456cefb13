"""tools/checkpoint.py: what it says of checkpoints, what it removes, and what it rewrites for other worlds."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_weights, rewrite_state
from ranks import run_ranks
from safetensors.torch import load_file
from students import STEPS, newest, student_options, topology_of
from test_zero import make_config

from piflow_dist.checkpoint import catalog
from piflow_dist.checkpoint.catalog import remove
from piflow_dist.checkpoint.files import read_json, verify
from piflow_dist.checkpoint.reshard import reshard
from piflow_dist.config import ConfigError


@pytest.fixture
def tool(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """tool("ls", run): exit code and all that was printed."""
    from conftest import load_tool

    from piflow_dist.cli import run_tool as run_in_this_process

    monkeypatch.setenv("COLUMNS", "200")
    module = load_tool("checkpoint")

    def tool(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            run_in_this_process(module.checkpoint, [str(argument) for argument in arguments], module.__doc__)
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return tool


@pytest.fixture
def three(teacher_run: Path, tmp_path: Path) -> Path:
    """A run folder with three checkpoints: steps 24, 32 and 40."""
    return shutil.copytree(teacher_run, tmp_path / "three")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_ls_and_verify_tell_the_whole_from_the_damaged(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    folder = three / "checkpoints"
    rewrite_state(folder / "step_00000040", lambda state: state.update(metrics={"loss": 0.25}))
    code, said = tool("ls", three)
    assert code == 0 and said.count("whole") == 3 and "0.2500" in said and "dp=2 tp=1" in said
    flip_a_bit(folder / "step_00000040" / "rank_00001.safetensors")
    (folder / "step_00000032" / "rank_00000.safetensors").write_bytes(b"cut")
    (folder / ".step_00000048.tmp").mkdir()
    code, said = tool("ls", three)
    assert code == 0 and said.count("whole") == 2 and "has 3 bytes" in said and ".step_00000048.tmp" in said
    code, said = tool("verify", three)
    assert code == 1 and "rank_00001.safetensors is damaged" in said and "2 of 3 checkpoints are damaged" in said
    assert tool("verify", folder / "step_00000024")[0] == 0


def test_a_checkpoint_that_a_training_removes_meanwhile_is_not_listed(
    tool: Callable[..., tuple[int, str]], three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = three / "checkpoints"

    def verify_late(path: Path, contents: bool) -> None:
        if path.name == "step_00000024" and path.exists():
            os.replace(path, folder / ".step_00000024.removed")  # as retention does
        verify(path, contents)

    monkeypatch.setattr(catalog, "verify", verify_late)
    code, said = tool("verify", three)
    assert code == 0 and said.count("whole") == 2 and "damaged" not in said


def test_show_and_diff(tool: Callable[..., tuple[int, str]], three: Path, students: Path) -> None:
    code, said = tool("show", students / "tied")
    assert code == 0 and "3 of 5" in said and "lora" in said and "fingerprint" in said and "26 tensors" in said
    older, newer = three / "checkpoints" / "step_00000032", three / "checkpoints" / "step_00000040"
    rewrite_state(newer, lambda state: state["config"]["optim"].update(lr=0.125))
    code, said = tool("diff", older, newer, "all=true")
    a, b = read_weights(older, ema=False), read_weights(newer, ema=False)
    name = "img_in.weight"
    line = next(line for line in said.splitlines() if name in line)
    assert f"{((b[name] - a[name]).norm() / a[name].norm()).item():.3e}" in line
    assert "0.125" in said and "optim.lr" in said and code == 0
    code, said = tool("diff", older, older)
    assert code == 0 and "0 of 71 common parameters differ" in said
    code, said = tool("diff", students / "tied", students / "full-dx")
    assert code == 0 and "only in A: " in said and "head.proj_out_means.weight" in said and "policy.type" in said


def test_rm_keeps_the_only_good_checkpoint(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    folder = three / "checkpoints"
    assert tool("rm", three, "yes=true")[0] == 2  # which?
    code, said = tool("rm", three, "step=40")
    assert code == 2 and "yes=true" in said and (folder / "step_00000040").exists()
    assert tool("rm", three, "step=40", "yes=true")[0] == 0
    assert {path.name for path in folder.iterdir()} == {"step_00000024", "step_00000032", "latest"}
    assert (folder / "latest").read_text().strip() == "step_00000032"
    flip_a_bit(folder / "step_00000024" / "rank_00000.safetensors")
    code, said = tool("rm", folder / "step_00000032", "yes=true")
    assert code == 2 and "only good checkpoint" in said and (folder / "step_00000032").exists()
    assert tool("rm", folder / "step_00000024", "yes=true")[0] == 0  # damaged ones may go
    with pytest.raises(ConfigError, match="only good checkpoint"):
        remove(str(three), None, True)


def test_requests_that_make_no_sense(tool: Callable[..., tuple[int, str]], three: Path) -> None:
    assert tool()[0] == 2 and tool("list", three)[0] == 2
    code, said = tool("diff", three)
    assert code == 2 and "A B" in said
    assert "does not exist" in tool("ls", "/nowhere")[1] and "'spread'" in tool("reshard", three, "x", "spread=2")[1]


# Checkpoints rewritten for another world.


def resave_rank(rank: int, students: Path, data: Path, teacher: Path, out: Path) -> None:
    """What a tensor-parallel world writes after resuming: of the original, and of one rewritten for another world."""
    from piflow_dist import train

    topology = topology_of(rank, 2, 2)
    for name, source in {"tied": students / "tied", "full-dx": students / "full-dx", "again": out / "for_4"}.items():
        folder = out / f"resaved_{name}"
        if rank == 0:
            shutil.copytree(source, folder)
        torch.distributed.barrier()
        options = (*student_options("tied" if name == "again" else name), "launch.processes=2", "parallel.tp=2")
        run = train.build_run(make_config((*options, "train.micro_batch_size=4"), data, teacher, folder), topology)
        train.resume(run)
        assert run.state.step == STEPS
        train.save(run)


def test_rewritten_files_are_those_of_the_other_world(
    students: Path, tiny_data: Path, teacher_run: Path, tmp_path: Path
) -> None:
    reshard(newest(students / "tied"), tmp_path / "for_4", dp=2, tp=2)
    run_ranks(resave_rank, 2, students, tiny_data, teacher_run, tmp_path, time_limit=420)
    for name, source in {
        "tied": students / "tied",
        "full-dx": students / "full-dx",
        "again": tmp_path / "for_4",
    }.items():
        made, want = (
            reshard(newest(source), tmp_path / f"made_{name}", dp=1, tp=2),
            newest(tmp_path / f"resaved_{name}"),
        )
        for rank in range(2):
            assert_same_file(made, want, f"rank_{rank:05d}.safetensors")
        states = [read_json(folder / "state.json") for folder in (made, want)]
        for state in states:
            state["config"]["run_dir"] = state["config"]["train"]["micro_batch_size"] = state["parent"] = None
        assert states[0] == states[1]
    back = reshard(newest(tmp_path / "for_4"), tmp_path / "back", dp=1, tp=1)
    assert_same_file(back, newest(students / "tied"), "rank_00000.safetensors")


def assert_same_file(made: Path, want: Path, file: str) -> None:
    found, wanted = load_file(made / file), load_file(want / file)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, (file, name)


@pytest.mark.parametrize(
    ("dp", "tp", "words"), [(3, 1, "train.batch_size=4"), (1, 4, "attention heads"), (0, 1, "dp=0")]
)
def test_worlds_that_cannot_train_are_refused(students: Path, tmp_path: Path, dp: int, tp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reshard(newest(students / "tied"), tmp_path / "run", dp, tp)
    assert list(tmp_path.iterdir()) == []
