"""SIGTERM that reaches one rank only, of another tensor-parallel slice than rank 0's, while a checkpoint is being written.

All ranks stop after the same step, with the checkpoint under way and one of that step.
"""

import os
import signal
from pathlib import Path

import torch
from conftest import TINY
from ranks import run_ranks

from piflow_dist.checkpoint.files import step_name, steps_on_disk, verify
from piflow_dist.checkpoint.phases import DELAY_VARIABLE


def train_rank(rank: int, data: Path, run_dir: Path) -> tuple[bool, int, list[int]]:
    """(whether all steps were done, steps done, checkpoints that were complete when step 3 began)."""
    from datetime import timedelta

    from piflow_dist import train
    from piflow_dist.config import load_config
    from piflow_dist.launch.signals import StopRequest
    from piflow_dist.launch.watchdog import Unwatched
    from piflow_dist.parallel.groups import start_groups
    from piflow_dist.parallel.topology import Topology

    complete: list[int] = []

    class TerminatedInStep3(Unwatched):
        step = 0

        def __init__(self):
            self.request = StopRequest()

        def begin_step(self, step: int) -> None:
            self.step = step
            if step == 3:
                complete.extend(steps_on_disk(run_dir / "checkpoints"))
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        @property
        def stop_requested(self) -> bool:
            if rank == 1 and self.step == 3:
                self.request.wait(60)
            return self.request.made

    os.environ[DELAY_VARIABLE] = "0.2"  # for each phase of a save
    start_groups(2, timedelta(seconds=600))
    options = ("objective=flow_matching", "optim.type=sgd", "train.batch_size=4", "train.steps=8", "checkpoint.every=2")
    parallel = ("launch.processes=2", "parallel.tp=2", "tracking.enabled=false")
    config = load_config([*TINY, *options, *parallel, f"data.root={data}", f"run_dir={run_dir}"])
    topology = Topology(rank, 2, rank, torch.device("cpu"), 2)
    run = train.build_run(config, topology, TerminatedInStep3())
    return train.train(run, None), run.state.step, complete


def test_sigterm_at_one_rank_during_a_save_stops_all_at_the_same_step(tiny_data: Path, tmp_path: Path) -> None:
    assert run_ranks(train_rank, 2, tiny_data, tmp_path, time_limit=300.0) == [(False, 3, []), (False, 3, [])]
    assert steps_on_disk(tmp_path / "checkpoints") == [3, 2]
    for step in (2, 3):
        verify(tmp_path / "checkpoints" / step_name(step))
