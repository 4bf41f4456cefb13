"""Which process this is, on which device; the one place that starts torch.distributed."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from piflow_dist.parallel.environment import LAUNCHER_PID, default_threads, find_place, set_environment

if TYPE_CHECKING:
    from piflow_dist.parallel.groups import ParallelUnit


@dataclass(frozen=True)
class Topology:
    """A process's place: tensor-parallel ranks are consecutive, data-parallel ranks tp apart."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp: int = 1

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self.mpu is None else self.mpu.get_data_parallel_group()

    @property
    def mpu(self) -> "ParallelUnit | None":
        """The groups as DeepSpeed asks for them; None without tensor parallelism."""
        if self.tp == 1:
            return None
        from piflow_dist.parallel.groups import ParallelUnit

        return ParallelUnit()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def partition_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension along which a parameter is split over the tensor-parallel group; None where it is replicated.

    The marks are Megatron's, and DeepSpeed's gradient norm reads them.
    """
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """auto | cpu | cuda -> this process's device. Raises ValueError where the wanted one is not there.

    A scheduler may show each process all GPUs of the node or only its own one.
    """
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        count = torch.cuda.device_count()
        if count == 1 and "SLURM_LOCALID" in os.environ and LAUNCHER_PID not in os.environ:
            return torch.device("cuda", 0)
        if local_rank >= count:
            raise ValueError(
                f"Process {local_rank} of this machine has no GPU: {count} found. "
                f"Set launch.processes={max(count, 1)}, or launch.device=cpu."
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def start_process_group(device: str, timeout_seconds: int, tp: int = 1) -> Topology:
    """Join the process group of torchrun's or SLURM's processes.

    tp: ranks per tensor-parallel group; must divide the number of processes.
    """
    die_with_parent()
    place = find_place()
    set_environment(place)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(default_threads(place))
    chosen = choose_device(device, place.local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Optimisers decorated with torch.compile would call a C++ compiler for functions that take microseconds here.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        dist.init_process_group("gloo", timeout=timeout)
    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timeout)
    return Topology(place.rank, place.world_size, place.local_rank, chosen, tp)


def die_with_parent() -> None:
    """Ask Linux to end this process when its launcher dies, also by SIGKILL, so that none is left behind."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        # Not SIGTERM, which asks a training process for a last checkpoint: the next launch may be on its way already.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A launcher that died during this process's imports sends no signal any more.
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher and os.getppid() != int(launcher):
        sys.exit("The launcher has died; this process ends too.")
