"""What the ranks of a sampling request tell one another beside a split model's layers: small lists, and that they are done."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from piflow_dist.parallel.topology import Topology, start_process_group
from piflow_dist.sampling.settings import SampleConfig

PATIENCE = timedelta(days=30)
"""Ranks may finish hours apart. A rank that dies ends the others through its launcher, not through this."""


class Control:
    """A gloo group of all ranks, on the CPU whatever the model is on."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.layers: dist.ProcessGroup | None = None

    def from_main(self, flags: list[bool]) -> list[bool]:
        """Rank 0's flags. (Ranks look at a shared folder at different moments.)"""
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.broadcast(told, 0, group=self.group)
        return told.bool().tolist()

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """True where a rank says so."""
        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return told.bool().tolist()

    def wait_for_all(self) -> None:
        dist.barrier(group=self.group)

    def share_layers(self, topology: Topology, all_ranks: bool) -> None:
        """Say who makes each evaluation together: a tensor-parallel group, or all ranks. Of all ranks at once."""
        self.layers, size = None, topology.world_size if all_ranks else topology.tp
        for first in range(0, topology.world_size, size) if size > 1 else ():
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=PATIENCE)
            if topology.rank in ranks:
                self.layers = group

    def wait_for_layers(self) -> None:
        """Until the ranks that make the next evaluation with this one are ready for it: inside a layer they would wait
        launch.timeout_seconds at most, and one of them may be decoding dozens of images."""
        if self.layers is not None:
            dist.barrier(group=self.layers)

    def close(self) -> None:
        """Together: rank 0 may hold the store that the others' groups still ask."""
        self.wait_for_all()
        dist.destroy_process_group()


def start_ranks(config: SampleConfig) -> tuple[Topology, Control]:
    if config.compile:
        os.environ["TORCHDYNAMO_DISABLE"] = "0"  # which training on a CPU sets
    launch = config.launch
    topology = start_process_group(launch.device, launch.timeout_seconds, config.parallel.tp)
    if topology.device.type == "cpu":
        # Not the cores shared out: a matrix product's bits depend on its threads, so on how many processes there are.
        torch.set_num_threads(launch.threads or 1)
    return topology, Control()
