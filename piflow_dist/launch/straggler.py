"""Which rank holds the others up. In ZeRO-3 all ranks wait for the slowest many times a step, so every rank's step takes as long.

Two things are each rank's own: how long it waited for its data, and how fast its device does a fixed piece of arithmetic.
"""

import statistics
import time

import torch
import torch.distributed as dist

SIZE = {"cpu": 192, "cuda": 4096}
"""Side of the matrices of the probe: a fraction of a millisecond on either."""
REPEATS = 4


class StragglerProbe:
    """Measured every `every` steps; collective, so every rank must be there."""

    def __init__(self, device: torch.device, every: int):
        self.device, self.every = device, every
        self.waited = 0.0
        self.steps = 0
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.matrix = torch.ones(SIZE[device.type], SIZE[device.type], dtype=dtype, device=device)

    def add_wait(self, seconds: float) -> None:
        """Seconds for which this step waited for data."""
        self.waited += seconds
        self.steps += 1

    def measure(self, step: int) -> dict[str, float]:
        """Metrics, alike on all ranks; empty between measurements."""
        if step % self.every:
            return {}
        mine = torch.tensor([self.waited / max(self.steps, 1), self._probe()], device=self.device)
        self.waited, self.steps = 0.0, 0
        all_RM = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_RM, mine)
        waits, probes = zip(*(pair.tolist() for pair in all_RM), strict=True)
        return slowest("data_wait", waits) | slowest("device", probes)

    def _probe(self) -> float:
        """Seconds of the arithmetic, the best of a few: others' work on a shared CPU is not the device's."""
        best = float("inf")
        for _ in range(REPEATS):
            self._synchronize()
            began = time.perf_counter()
            self.matrix @ self.matrix
            self._synchronize()
            best = min(best, time.perf_counter() - began)
        return best

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def slowest(name: str, seconds: tuple[float, ...]) -> dict[str, float]:
    """The worst rank's seconds, its number and how it compares with the median rank."""
    rank = max(range(len(seconds)), key=lambda rank: seconds[rank])
    return {
        f"{name}_slowest": seconds[rank],
        f"{name}_slowest_rank": rank,
        f"{name}_slowest_ratio": seconds[rank] / max(statistics.median(seconds), 1e-9),
    }
