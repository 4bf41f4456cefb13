"""Which process this is, on which device; the one place that starts torch.distributed."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCHER_PID = "PIFLOW_LAUNCHER_PID"


@dataclass(frozen=True)
class Topology:
    """A process's place. Data-parallel only so far: dp_rank is the global rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """auto | cpu | cuda -> this process's device. Raises ValueError where the wanted one is not there."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"Process {local_rank} of this machine has no GPU: {count} found. "
                f"Set launch.processes={max(count, 1)}, or launch.device=cpu."
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def start_process_group(device: str, timeout_seconds: int) -> Topology:
    """Join the process group described by torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*)."""
    die_with_parent()
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = choose_device(device, local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Optimisers decorated with torch.compile would call a C++ compiler for functions that take microseconds here.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        dist.init_process_group("gloo", timeout=timeout)
    return Topology(rank, world_size, local_rank, chosen)


def die_with_parent() -> None:
    """Ask Linux to end this process when its launcher dies, also by SIGKILL, so that none is left behind."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # A launcher that died during this process's imports sends no signal any more.
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher and os.getppid() != int(launcher):
        sys.exit("The launcher has died; this process ends too.")
