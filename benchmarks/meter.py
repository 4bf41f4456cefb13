"""What a step costs: seconds, memory and messages of its parts, the arithmetic a model needs, and what the device can do.

B batch, T image tokens, L text tokens, S = L + T, D width, N blocks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from piflow_dist.config import Config


class Memory:
    """Bytes that this process holds at most: allocated on an accelerator, resident on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.accelerator.reset_peak_memory_stats(self.device)

    @property
    def peak(self) -> int:
        if self.device.type == "cpu":
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        return torch.accelerator.max_memory_allocated(self.device)


class Meter:
    """Seconds and peak memory of named parts. A part inside another one is taken out of it.

    Off, it costs nothing; on, it waits for the device at every border, so a step takes longer than it does alone.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.memory, self.on = device, clock, Memory(device), False
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.open: list[str] = []
        self.since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._border()
        self.open.append(name)
        try:
            yield
        finally:
            self._border()
            self.open.pop()

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def _border(self) -> None:
        synchronize(self.device)
        now = self.clock()
        if self.open:
            name = self.open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
            self.peak[name] = max(self.peak.get(name, 0), self.memory.peak)
        self.memory.reset()
        self.since = self.clock()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(device: torch.device, run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize(device)
    began = clock()
    run()
    synchronize(device)
    return clock() - began


@contextmanager
def messages(device: torch.device) -> Iterator[dict[str, tuple[int, float]]]:
    """{collective: (messages, seconds)} of what runs inside, from torch's profiler; seconds include waiting for other ranks."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, tuple[int, float]] = {}
    activities = [ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        yield found
    for event in profiler.events():
        if event.name.startswith(("gloo:", "ncclDevKernel_")):
            name = event.name.removeprefix("ncclDevKernel_").partition("(")[0]
            count, seconds = found.get(name, (0, 0.0))
            microseconds = event.time_range.elapsed_us() if device.type == "cpu" else event.device_time_total
            found[name] = count + 1, seconds + microseconds / 1e6


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float], repeats: int = 20) -> float:
    """FLOP/s of a square matrix product that fills the device: what the model's rate is a share of."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    run()
    return 2 * size**3 * repeats / min(timed(device, run, clock) for _ in range(3))


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of one image in one pass forward; a product of (m, k) and (k, n) matrices counts 2 m k n."""

    trunk: float
    """Products with frozen or trained weights of the transformer."""
    attention: float
    adapters: float
    """Of the published targets."""
    head: float

    @classmethod
    def of(cls, config: Config, image_tokens: int, text_tokens: int) -> "Arithmetic":
        model, T, L = config.model, image_tokens, text_tokens
        D, N, rank = model.width, model.num_layers, config.lora.rank
        stream = 4 * D * D + 8 * D * D  # attention's four projections, and the MLP
        unread = L * 9 * D * D  # of the last block's text only queries, keys and values are read
        blocks = N * ((T + L) * stream + 2 * 6 * D * D) - unread
        ends = T * 4 * model.latent_channels * D + L * model.joint_attention_dim * D + 256 * D + D * D + 2 * D * D
        outputs = 4 * model.latent_channels
        if config.policy.type == "gmflow":
            head = T * D * config.policy.num_components * (outputs + 4)
        else:
            head = T * D * config.policy.num_nodes * outputs
        adapted = N * (T + L) * 10 * D * rank - L * 10 * D * rank if config.mode == "tied" else 0
        return cls(2 * (blocks + ends), N * 4 * (T + L) ** 2 * D, 2 * adapted, 2 * head)

    @property
    def teacher(self) -> float:
        return self.trunk + self.attention

    @property
    def forward(self) -> float:
        return self.teacher + self.adapters + self.head

    def backward(self, tied: bool) -> float:
        """What is needed, once: recomputed activations do not count. A frozen weight has no gradient of its own."""
        return (self.trunk if tied else 2 * self.trunk) + 2 * (self.attention + self.adapters + self.head)
