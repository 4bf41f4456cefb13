"""Who computes what, so that the number of processes changes no digit.

Images come in fixed batches of consecutive ones, whole batches go to ranks in turn, and results are put together in the order of
images: a network sees the same batches on any number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's part."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def batches(self, count: int, size: int) -> Iterator[range]:
        """Of `count` things in batches of `size`: those of this rank."""
        for start in range(self.rank * size, count, self.world_size * size):
            yield range(start, min(start + size, count))

    def tasks(self, count: int) -> range:
        return range(self.rank, count, self.world_size)

    def gather(self, rows: dict[int, Tensor], count: int) -> Tensor:
        """(count, ...) on every rank, on the CPU, from each rank's own rows of one shape and type; what no rank has is not a number.

        A sum with zeros, which is exact. Of values that are not numbers at all ranks, too: they stay so.
        """
        shape = torch.zeros(8, dtype=torch.int64, device=self.device)
        for row in list(rows.values())[:1]:
            shape[: row.dim() + 2] = torch.tensor([row.dim() + 1, row.dtype == torch.float64, *row.shape])
        if self.world_size > 1:
            dist.all_reduce(shape, op=dist.ReduceOp.MAX)
        axes, double, *sizes = shape.tolist()
        if axes == 0:
            return torch.empty(count, 0)
        dtype = torch.float64 if double else torch.float32
        whole = torch.zeros(count, *sizes[: axes - 1], dtype=dtype, device=self.device)
        known = torch.zeros(count, dtype=torch.float32, device=self.device)
        for index, row in rows.items():
            whole[index], known[index] = row.to(whole), 1
        if self.world_size > 1:
            dist.all_reduce(whole)
            dist.all_reduce(known)
        whole[known == 0] = torch.nan
        return whole.cpu()

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()
