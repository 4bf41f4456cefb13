"""tools/chaos.py: 30 kills, and that it would notice a training that is not the same."""

import json
import re
from pathlib import Path

import pytest
from conftest import load_tool, run_tool

from piflow_dist.config import load_config
from piflow_dist.launch.chaos import Chaos, ChaosConfig, read_everything

KILLS, STEPS = 30, 16


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos") / "out"


@pytest.fixture(scope="module")
def said(out: Path) -> str:
    done = run_tool("chaos", f"out={out}", f"kills={KILLS}", "seed=5", "save_delay=0.02", time_limit=900)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_thirty_kills_change_nothing(said: str) -> None:
    summary = " ".join(said.split())
    assert ": 0 differences, 0 damaged checkpoints, 0 failed launches." in summary
    launches, finished, rows = map(
        int, re.search(r"(\d+) launches, (\d+) trainings.* (\d+) logged steps", summary).groups()
    )
    assert launches == KILLS + finished and finished >= 2
    assert rows >= finished * STEPS
    kills = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    counts = {cells[0].strip(): int(cells[-1]) for cells in kills}
    assert counts.pop("all") == KILLS == sum(counts.values())
    assert sum(count for moment, count in counts.items() if moment.startswith("save: ")) >= 8


def finished_run(out: Path) -> Path:
    return next(
        path for path in sorted(out.glob("data-tied_*/run")) if (path / f"checkpoints/step_{STEPS:08d}").exists()
    )


def test_another_training_would_be_noticed(said: str, out: Path) -> None:
    """The comparisons themselves, on a run that was not disturbed enough to be another one."""
    judge = Chaos(load_config([f"out={out}"], ChaosConfig, "chaos"))
    reference, run_dir = out / "data-tied" / "run", finished_run(out)
    judge.examine(run_dir, reference, exact=True)
    judge.compare_ends(run_dir, reference, exact=True)
    assert judge.tally.clean
    assert any(name.startswith("optimizer/") for name in read_everything(run_dir / "checkpoints" / f"step_{STEPS:08d}"))
    judge.compare_ends(out / "datafree-full" / "run", reference, exact=True)
    assert "other tensors" in judge.tally.differing.pop()

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[3]["grad_norm"] *= 1 + 1e-15
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != 9))
    judge.examine(run_dir, reference, exact=True)
    (difference,) = judge.tally.differing
    assert "step 4: grad_norm" in difference
    judge.compare_ends(run_dir, reference, exact=True)
    assert "has the steps" in judge.tally.differing[-1]
    shard = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    judge.examine(run_dir, reference, exact=True)
    assert any("rank_00001.safetensors is damaged" in text for text in judge.tally.damaged)
    judge.compare_ends(run_dir, reference, exact=True)
    assert any(text.endswith("differs") for text in judge.tally.differing)


def test_a_difference_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from piflow_dist.launch.chaos import Tally

    tool = load_tool("chaos")
    monkeypatch.setattr(tool.Chaos, "run", lambda self: Tally(differing=["step 4: loss"]))
    with pytest.raises(SystemExit) as stop:
        tool.chaos([])
    assert stop.value.code == 1
    assert "step 4: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("request_", "said_"),
    [
        ("scenarios=[data-tied,data-half]", "datafree-full"),
        ("processes=5", "5 processes do not share 12 images"),
        ("steps=4", "too few saves"),
        ("dtype=bf16 worlds=[1]", "bit-continuous"),
    ],
)
def test_requests_that_cannot_work(refused_by: object, request_: str, said_: str) -> None:
    assert said_ in refused_by("chaos")(*request_.split())
