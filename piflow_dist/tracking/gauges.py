"""Figures of tracking.log_every steps: what a step spends its time on, rates, memory, the machine. Read together, at one step boundary."""

import json
import shutil
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from piflow_dist.config import Config
from piflow_dist.distill.diagnostics import StepMeter
from piflow_dist.parallel.topology import Topology
from piflow_dist.tracking.journal import TRACKING

GIB = 1 << 30
PHASES = {
    "data": "seconds_data",
    "forward and backward": "seconds_forward_backward",
    "optimizer": "seconds_optimizer",
    "loss": "seconds_loss",
    "ema": "seconds_ema",
}
PLAN = "plan.json"


class PhaseClock:
    """Seconds of each phase of a step. On a GPU between events in its queue, so that nothing waits for it."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.borders: list[tuple[str, object]] = []
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.borders.append((phase, moment))

    def end_step(self) -> None:
        """Behind the moment at which the loss was read, so that the device has passed every border."""
        self.enter("rest")
        for (phase, began), (_, ended) in zip(self.borders[:-1], self.borders[1:], strict=True):
            if self.on_gpu:
                ended.synchronize()  # the last border alone is not behind the reading, by a few microseconds
                spent = began.elapsed_time(ended) / 1000
            else:
                spent = ended - began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.borders = []

    def read(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


class Gauges:
    """Of a training process; `measure` is collective."""

    def __init__(self, config: Config, topology: Topology):
        self.config, self.topology, self.every = config, topology, config.tracking.log_every
        nfe = config.distill.nfe if config.distils else 0
        self.meter = StepMeter(topology.device, nfe, config.distill.loss_scale)
        self.clock = PhaseClock(topology.device)
        self.process = psutil.Process()
        self.steps, self.seconds, self.clipped = 0, 0.0, 0
        psutil.cpu_percent()  # of the time since the call before
        self.network, self.network_at = network_bytes(), time.monotonic()

    def end_step(self, seconds: float, clipped: bool) -> None:
        """seconds: of the whole step."""
        self.clock.end_step()
        self.steps += 1
        self.seconds += seconds
        self.clipped += clipped

    def measure(self, step: int) -> dict[str, float]:
        """Metrics, of this rank or of all together (docs/tracking.md says which); empty between measurements."""
        if step % self.every:
            return {}
        steps, seconds = self.steps, max(self.seconds, 1e-9)
        values = self.meter.read(self.topology.tp)
        values["tokens_per_second"] = values.pop("tokens") / seconds
        phases = self.clock.read()
        values |= {name: phases[phase] / steps for phase, name in PHASES.items() if phase in phases}
        values["data_wait"] = values.get("seconds_data", 0.0) / (seconds / steps)
        values["clip_rate"] = self.clipped / steps
        values |= self._memory() | self._arithmetic(seconds / steps)
        if self.topology.is_main:
            values |= self._machine()
        self.steps, self.seconds, self.clipped = 0, 0.0, 0
        return values

    def _memory(self) -> dict[str, float]:
        """Of the rank that has most."""
        device = self.topology.device
        found = {"memory/host_gib": self.process.memory_info().rss / GIB}
        if device.type == "cuda":
            found["memory/allocated_gib"] = torch.cuda.memory_allocated(device) / GIB
            found["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            found["memory/reserved_gib"] = torch.cuda.memory_reserved(device) / GIB
        most = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return dict(zip(found, most.tolist(), strict=True))

    def _arithmetic(self, seconds: float) -> dict[str, float]:
        """By the planner's count (tracking/planned.py), once that is there."""
        path = Path(self.config.run_dir) / TRACKING / PLAN
        if not self.topology.is_main or not path.exists():
            return {}
        flops = sum(json.loads(path.read_text())["flops"].values())
        values = {"tflops_per_gpu": flops / seconds / 1e12}
        cluster = self.config.cluster
        peak = self.config.tracking.peak_tflops or (cluster.peak_tflops if cluster is not None else None)
        return values | ({"share_of_peak": values["tflops_per_gpu"] / peak} if peak else {})

    def _machine(self) -> dict[str, float]:
        """Of rank 0's node."""
        memory, sent, moment = psutil.virtual_memory(), network_bytes(), time.monotonic()
        values = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": memory.percent,
            "system/disk_free_gib": shutil.disk_usage(self.config.run_dir).free / GIB,
            "system/network_mb_per_second": (sent - self.network) / 1e6 / max(moment - self.network_at, 1e-9),
        }
        self.network, self.network_at = sent, moment
        if self.topology.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.topology.device)
            values["system/gpu_memory_percent"] = 100 * (1 - free / total)
        return values


def network_bytes() -> int:
    """Sent and received by the machine."""
    counters = psutil.net_io_counters()
    return 0 if counters is None else counters.bytes_sent + counters.bytes_recv
