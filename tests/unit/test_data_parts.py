"""Preparation by several processes: the same bytes for any number of them, and nothing done twice after kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from photos import settings, write_folder

from data_pipeline import plan as plan_module
from data_pipeline import prepare as prepare_module
from data_pipeline.description import DatasetDescription, load_description
from data_pipeline.errors import DataError
from data_pipeline.parts import Workshop
from data_pipeline.prepare import prepare
from data_pipeline.shards import ShardSet
from data_pipeline.world import rank_and_size

REPO = Path(__file__).parents[2]
COUNT = 44
PARTS = 6
"""Of at most 8 samples."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("photos"), COUNT)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a red flower")
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by one process."""
    out = tmp_path_factory.mktemp("whole") / "set"
    prepare(settings(out, photos, test_share=0.2), show_progress=False)
    return out


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, kind: str = "torchrun") -> None:
    names = ("RANK", "WORLD_SIZE") if kind == "torchrun" else ("SLURM_PROCID", "SLURM_NTASKS")
    for name, value in zip(names, (rank, size), strict=True):
        monkeypatch.setenv(name, str(value))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def keys_of(description: DatasetDescription) -> list[str]:
    keys = []
    for split in description.splits:
        shards = ShardSet(description, split, cache_dir=description.root.parent / "cache")
        keys += [shards[i]["key"] for i in range(shards.size)]
    return keys


def test_splits_by_hash_of_the_key(whole: Path) -> None:
    description = load_description(whole)
    assert sum(description.splits.values()) == COUNT
    assert 3 <= description.splits["test"] <= 15
    assert description.left_out == {"not an image": 1}
    assert len(set(keys_of(description))) == COUNT


@pytest.mark.parametrize(("size", "kind"), [(2, "torchrun"), (3, "slurm")])
def test_any_number_of_processes_makes_the_same_bytes(
    whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, kind: str
) -> None:
    config = settings(tmp_path / "set", photos, test_share=0.2)
    for rank in range(size):
        as_rank(monkeypatch, rank, size, kind)
        made = prepare(config, show_progress=False)
        assert (made is None) == (rank < size - 1)  # the last one publishes
    assert files_of(tmp_path / "set") == files_of(whole)
    as_rank(monkeypatch, 0, size, kind)
    assert prepare(config, show_progress=False) == made
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


NURSERY = """
import json, os, sys
sys.path.insert(0, {unit!r})
from pathlib import Path
import data_pipeline.shards, torch
from nvidia.dali import fn, pipeline_def, types
from photos import settings
from data_pipeline.parts import Workshop
from data_pipeline.prepare import prepare
torch.set_num_threads(1)
encode = Workshop.encode

def work(rank, size, kill_after):
    calls = 0
    def logged(self, group, bucket):
        nonlocal calls
        calls += 1
        if calls == kill_after:
            os.kill(os.getpid(), 9)
        done = encode(self, group, bucket)
        with open({log!r}, "a") as lines:
            lines.write("".join(sample.key + "\\n" for sample in done[0]))
        return done
    Workshop.encode = logged
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size))
    prepare(settings(Path({out!r}), Path({photos!r}), test_share=0.2), show_progress=False)

for line in sys.stdin:
    kills = json.loads(line)
    children = []
    for rank, kill_after in enumerate(kills):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                work(rank, len(kills), kill_after)
                status = 0
            finally:
                os._exit(status)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


def test_kills_lose_a_part_at_most_and_double_nothing(whole: Path, photos: Path, tmp_path: Path) -> None:
    """Two processes at once, killed in the middle of parts, twice; then three finish."""
    out, log = tmp_path / "set", tmp_path / "log"
    code = NURSERY.format(unit=str(Path(__file__).parent), out=str(out), photos=str(photos), log=str(log))
    nursery = subprocess.Popen(  # imports once and forks: a process of Python with all this takes seconds to start
        [sys.executable, "-c", code],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def start(kills: list[int]) -> list[int]:
        nursery.stdin.write(json.dumps(kills) + "\n")
        nursery.stdin.flush()
        return json.loads(nursery.stdout.readline())

    try:
        check_kills(start, whole, tmp_path)
    finally:
        nursery.kill()
        nursery.stdin.close()
        nursery.stdout.close()
        nursery.wait(timeout=30)


def check_kills(start: Callable[[list[int]], list[int]], whole: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "set", tmp_path / "log"
    work = tmp_path / ".set.parts"
    finished: set[str] = set()
    for kills in ([5, 4], [3, 6]):
        before = set(os.listdir(work / "done")) if work.exists() else set()
        log_before = Counter(log.read_text().split()) if log.exists() else Counter()
        assert start(kills) == [-signal.SIGKILL] * 2
        assert not out.exists()
        finished = set(os.listdir(work / "done"))
        assert before < finished
        plan = plan_module._read_plan(work)[0]
        again = Counter(log.read_text().split()) - log_before
        for part in plan.parts:
            if part.name in before:
                assert not any(item.key in again for item in plan.items(part))  # finished parts are left alone
    assert 2 <= len(finished) < PARTS
    assert start([99, 99, 99]) == [0, 0, 0]
    assert files_of(out) == files_of(whole)
    assert sorted(os.listdir(tmp_path)) == ["log", "set"]
    encoded = Counter(log.read_text().split())
    assert set(encoded) == set(keys_of(load_description(out)))
    # Each of four kills may have cost the part that was at work.
    assert sum(encoded.values()) - len(encoded) <= 4 * 8


def test_killed_while_it_is_put_together(
    whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import parts
    from data_pipeline import prepare as prepare_module

    config = settings(tmp_path / "set", photos, test_share=0.2)
    move, moved = parts._move_shard, []

    def killed(*arguments: object) -> None:
        moved.append(arguments)
        if len(moved) == 6:
            raise KeyboardInterrupt
        move(*arguments)

    monkeypatch.setattr(parts, "_move_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, show_progress=False)
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(parts, "_move_shard", move)
    monkeypatch.setattr(Workshop, "encode", None)  # nothing is left to encode
    prepare(config, show_progress=False)
    assert files_of(tmp_path / "set") == files_of(whole)
    # And between the last rename and the removal of the parts.
    (tmp_path / ".set.parts").mkdir()
    monkeypatch.setattr(prepare_module, "_prepare_parts", None)
    assert prepare(config, show_progress=False).splits == load_description(whole).splits
    assert os.listdir(tmp_path) == ["set"]


@pytest.fixture
def unfinished(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preparation of which only rank 0's share is done."""
    shutil.copytree(photos, tmp_path / "photos")
    as_rank(monkeypatch, 0, 2)
    assert prepare(settings(tmp_path / "set", tmp_path / "photos"), show_progress=False) is None
    return tmp_path


def test_a_set_that_another_rank_publishes_while_this_one_opens_its_models(
    whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, work, slow = settings(tmp_path / "set", photos, test_share=0.2), prepare_module._work, [True]

    def work_late(*arguments: object) -> None:
        if slow:
            slow.clear()
            prepare(config, show_progress=False)  # the other one
        work(*arguments)

    monkeypatch.setattr(prepare_module, "_work", work_late)
    found = prepare(config, show_progress=False)
    assert files_of(found.root) == files_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_unfinished_preparation_is_not_continued_as_another(unfinished: Path) -> None:
    with pytest.raises(ValueError, match=r"was begun with resolution=64 \(now 80\). Finish it with those settings, or"):
        prepare(settings(unfinished / "set", unfinished / "photos", resolution=80), show_progress=False)


def test_a_source_that_changes_meanwhile_is_noticed(unfinished: Path) -> None:
    (unfinished / "photos" / "broken.jpg").write_bytes(b"another")
    with pytest.raises(DataError, match=r"photos has changed since the preparation of .* began \(45 samples then\)"):
        prepare(settings(unfinished / "set", unfinished / "photos"), show_progress=False)


def test_overwriting_by_several_processes_is_refused(unfinished: Path) -> None:
    with pytest.raises(ValueError, match="overwrite=true on 2 processes"):
        prepare(settings(unfinished / "set", unfinished / "photos", overwrite=True), show_progress=False)


def test_ranks_that_contradict_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_and_size() == (0, 1)
    as_rank(monkeypatch, 3, 2, "slurm")
    with pytest.raises(ValueError, match="SLURM_PROCID=3, SLURM_NTASKS=2"):
        rank_and_size()
    as_rank(monkeypatch, 1, 2)
    assert rank_and_size() == (1, 2)
