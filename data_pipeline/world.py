"""Which of how many processes this one is: torchrun's variables, else SLURM's, else one alone. No process group is needed."""

import os


def rank_and_size() -> tuple[int, int]:
    """Raises ValueError where the variables contradict each other."""
    for rank_name, size_name in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank_name in os.environ and size_name in os.environ:
            rank, size = int(os.environ[rank_name]), int(os.environ[size_name])
            if not 0 <= rank < size:
                raise ValueError(f"{rank_name}={rank}, {size_name}={size}: a rank must be below the number of ranks.")
            return rank, size
    return 0, 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def local_device(device: str) -> str:
    """ "cuda" becomes this process's own GPU; a device with a number is left as it is."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{local_rank() % max(1, torch.cuda.device_count())}"
