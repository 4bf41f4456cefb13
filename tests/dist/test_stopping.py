"""A signal that reaches one rank only, of another tensor-parallel slice than rank 0's, stops all ranks after the same step."""

from pathlib import Path

import torch
from conftest import TINY
from ranks import run_ranks

from piflow_dist.checkpoint.files import newest_complete, steps_on_disk


def train_rank(rank: int, data: Path, run_dir: Path) -> tuple[bool, int]:
    """(whether all steps were done, steps done)."""
    from datetime import timedelta

    from piflow_dist import train
    from piflow_dist.config import load_config
    from piflow_dist.launch.watchdog import Unwatched
    from piflow_dist.parallel.groups import start_groups
    from piflow_dist.parallel.topology import Topology

    class SignalledInStep3(Unwatched):
        step = 0

        def begin_step(self, step: int) -> None:
            self.step = step

        @property
        def stop_requested(self) -> bool:
            return rank == 1 and self.step >= 3

    start_groups(2, timedelta(seconds=600))
    options = ("objective=flow_matching", "optim.type=sgd", "train.batch_size=4", "train.steps=8", "checkpoint.every=100")
    parallel = ("launch.processes=2", "parallel.tp=2", "tracking.enabled=false")
    config = load_config([*TINY, *options, *parallel, f"data.root={data}", f"run_dir={run_dir}"])
    topology = Topology(rank, 2, rank, torch.device("cpu"), 2)
    run = train.build_run(config, topology, SignalledInStep3())
    return train.train(run, None), run.state.step


def test_one_ranks_signal_stops_all_at_the_same_step(tiny_data: Path, tmp_path: Path) -> None:
    assert run_ranks(train_rank, 2, tiny_data, tmp_path, time_limit=300.0) == [(False, 3), (False, 3)]
    assert steps_on_disk(tmp_path / "checkpoints") == [3]
    assert newest_complete(tmp_path / "checkpoints")[0] is not None
