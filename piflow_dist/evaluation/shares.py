"""Who computes what, so that the number of processes changes no digit.

Images come in fixed batches of consecutive ones, whole batches go to ranks in turn, and results are put together in the order of
images: a network sees the same batches on any number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.control import PATIENCE

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's part."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    """Of networks and large sums; what ranks tell one another is on the CPU."""
    group: dist.ProcessGroup | None = None
    """Gloo, of all ranks; None: the default group."""

    @classmethod
    def of(cls, topology: Topology) -> "Share":
        """With a group whose ranks may wait for days: one computes a metric for longer than launch.timeout_seconds allows."""
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(topology.rank, topology.world_size, topology.device, group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def batches(self, count: int, size: int) -> Iterator[range]:
        """Of `count` things in batches of `size`: those of this rank."""
        for start in range(self.rank * size, count, self.world_size * size):
            yield range(start, min(start + size, count))

    def tasks(self, costs: list[float]) -> list[int]:
        """Of as many tasks as there are costs: those of this rank. The heaviest go first, each to the rank with the least to do."""
        loads = [0.0] * self.world_size
        mine = []
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            rank = loads.index(min(loads))
            loads[rank] += costs[task]
            mine += [task] if rank == self.rank else []
        return mine

    def gather(self, rows: dict[int, Tensor], count: int) -> Tensor:
        """(count, ...) on every rank, on the CPU, from each rank's own rows of one shape and type; what no rank has is not a number.

        A sum with zeros, which is exact. Of values that are not numbers at all ranks, too: they stay so.
        """
        shape = torch.zeros(8, dtype=torch.int64)
        for row in list(rows.values())[:1]:
            shape[: row.dim() + 2] = torch.tensor([row.dim() + 1, row.dtype == torch.float64, *row.shape])
        if self.world_size > 1:
            dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=self.group)
        axes, double, *sizes = shape.tolist()
        if axes == 0:
            return torch.empty(count, 0)
        dtype = torch.float64 if double else torch.float32
        whole = torch.zeros(count, *sizes[: axes - 1], dtype=dtype)
        known = torch.zeros(count, dtype=torch.float32)
        for index, row in rows.items():
            whole[index], known[index] = row.to(whole), 1
        if self.world_size > 1:
            dist.all_reduce(whole, group=self.group)
            dist.all_reduce(known, group=self.group)
        whole[known == 0] = torch.nan
        return whole

    def together(self, mine: dict[Any, Any]) -> dict[Any, Any]:
        """Every rank's entries, the lowest rank's where several have one."""
        if self.world_size == 1:
            return mine
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, mine, group=self.group)  # from processes of this very program
        return {key: value for found in reversed(gathered) for key, value in found.items()}

    def attempt(self, make: Callable[[], T]) -> T:
        """What `make` gives. Raises NotMeasurable on every rank where it fails on one, with the lowest rank's reason.

        A rank that went on alone would wait for the others for ever. What ranks do together inside fails on all of them.
        """
        made, failed = None, {}
        try:
            made = make()
        except (NotMeasurable, ValueError, OSError) as reason:
            failed["reason"] = str(reason)
        failed = self.together(failed)
        if failed:
            raise NotMeasurable(failed["reason"])
        return made

    def from_main(self, flag: bool) -> bool:
        """Rank 0's. (Ranks look at a shared folder at different moments.)"""
        told = torch.tensor([flag], dtype=torch.uint8)
        if self.world_size > 1:
            dist.broadcast(told, 0, group=self.group)
        return bool(told.item())

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)
