"""LatentStream inside processes of torch.distributed: right shares, and no collective call of its own."""

import os
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
