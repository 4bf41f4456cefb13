"""LatentStream inside processes of torch.distributed: right shares, and no collective call of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from data_sets import write_set  # noqa: E402

from data_pipeline.stream import LatentStream, read_all  # noqa: E402

STEPS = 9
TIME_LIMIT = 120


def check_ranks(rank: int, world_size: int, root: Path, want: list[list[str]], store: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    if rank == 1:
        # One rank alone may open a set: nothing waits for the others, who are already at the gather below.
        assert len(read_all(root, "test")["keys"]) == 6
    stream = LatentStream(
        root, "train", batch_size=8 // world_size, seed=0, dp_rank=rank, dp_size=world_size, num_workers=rank
    )
    mine = [stream.next()["keys"] for _ in range(STEPS)]
    state = stream.state_dict()
    stream.close()
    gathered: list = [None] * world_size
    dist.all_gather_object(gathered, (mine, state))
    for step in range(STEPS):
        of_step = [key for keys, _ in gathered for key in keys[step]]
        assert sorted(of_step) == sorted(want[step])
    assert all(other == state for _, other in gathered)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2])
def test_ranks_share_the_order_of_one_process(tmp_path: Path, world_size: int) -> None:
    """Nine global batches of 8 from 50 samples, across the end of the first epoch."""
    root = tmp_path / "set"
    write_set(root)
    alone = LatentStream(root, "train", batch_size=8, seed=0, cache_dir=tmp_path / "cache")
    want = [alone.next()["keys"] for _ in range(STEPS)]
    context = multiprocessing.spawn(
        check_ranks, (world_size, root, want, tmp_path / "store"), nprocs=world_size, join=False
    )
    try:
        deadline = time.monotonic() + TIME_LIMIT
        while not context.join(timeout=1):  # raises with the traceback of the first rank that failed
            assert time.monotonic() < deadline, f"the ranks did not finish within {TIME_LIMIT} s"
    finally:
        for process in context.processes:
            process.kill()


NURSERY = """
import json, os, sys, traceback
from pathlib import Path
import torch
from data_pipeline.stream import LatentStream
torch.set_num_threads(1)
ROOT, FOLDER = Path({root!r}), Path({folder!r})
STATE = FOLDER / "state.json"

def train(saved, rank, ranks, tp, workers, last, log):
    stream = LatentStream(
        ROOT, "train", batch_size=8 * tp // ranks, seed=3, dp_rank=rank // tp, dp_size=ranks // tp, global_batch=8,
        num_workers=workers, cache_dir=FOLDER / "cache", cache_bytes={cache},
    )
    step = 0
    if saved:
        stream.load_state_dict(saved["data"])
        step = saved["step"]
    with open(FOLDER / f"{{log}}-{{rank}}", "w") as lines:
        while True:
            batch = stream.next()
            step += 1
            print(json.dumps([step, list(batch["latents"].shape[1:]), batch["keys"]]), file=lines, flush=True)
            if step == last:
                os.kill(os.getpid(), 9)  # its workers find their pipes closed
            if rank == 0 and step % 4 == 0:
                temporary = STATE.with_suffix(".tmp")
                temporary.write_text(json.dumps(dict(step=step, data=stream.state_dict())))
                os.replace(temporary, STATE)

for line in sys.stdin:
    ranks, tp, workers, last, log = json.loads(line)
    saved = json.loads(STATE.read_text()) if STATE.exists() else None  # for all ranks alike: they do not wait for each other
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                train(saved, rank, ranks, tp, workers, last, log)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

RUNS = (
    # ranks, tensor-parallel ranks among them, workers of each, the step at which all are killed
    (1, 1, 1, 6),
    (2, 1, 1, 11),
    (4, 1, 1, 19),
    (4, 2, 1, 26),
    (2, 2, 0, 31),
    (1, 1, 2, 37),
)


def test_kills_and_other_numbers_of_ranks_change_no_sample(tmp_path: Path) -> None:
    """Six runs of one training, each killed, over three epochs of 11 batches from two buckets through a small cache."""
    root = tmp_path / "set"
    write_set(root, train={(4, 4): 52, (2, 8): 44})
    alone = LatentStream(root, "train", batch_size=8, seed=3, cache_dir=tmp_path / "alone")
    assert alone.samples_per_epoch == 11 * 8
    want = {step: alone.next() for step in range(1, RUNS[-1][3] + 1)}
    code = NURSERY.format(root=str(root), folder=str(tmp_path), cache=5 * 4096)
    nursery = subprocess.Popen(  # imports once and forks: the ranks of six runs would take a minute to start
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    seen: dict[int, list] = {}
    try:
        for number, (ranks, tp, workers, last) in enumerate(RUNS):
            nursery.stdin.write(json.dumps([ranks, tp, workers, last, f"run{number}"]) + "\n")
            nursery.stdin.flush()
            assert json.loads(nursery.stdout.readline()) == [-9] * ranks
            logs = [
                [json.loads(line) for line in (tmp_path / f"run{number}-{rank}").read_text().splitlines()]
                for rank in range(ranks)
            ]
            for rank in range(ranks):
                assert logs[rank] == logs[rank - rank % tp]  # a tensor-parallel group reads the same samples
            for parts in zip(*logs[::tp], strict=True):
                (step, shape, _) = parts[0]
                assert all(part[:2] == [step, shape] for part in parts)
                # A step that was redone after a kill has the samples that it had before.
                keys = [key for part in parts for key in part[2]]
                assert seen.setdefault(step, [shape, keys]) == [shape, keys]
    finally:
        nursery.kill()
        nursery.stdin.close()
        nursery.stdout.close()
        nursery.wait(timeout=30)
    assert sorted(seen) == sorted(want)
    for step, batch in want.items():
        assert seen[step] == [list(batch["latents"].shape[1:]), batch["keys"]]
    for epoch in range(3):
        of_epoch = [key for step in range(11 * epoch + 1, 11 * epoch + 12) for key in seen[step][1]]
        assert len(set(of_epoch)) == len(of_epoch) == 88
