"""Of the loop: optimizer, average, data, steps, checkpoints, sharding."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from piflow_dist.config.checks import require, require_choice, require_positive


@dataclass(kw_only=True)
class OptimConfig:
    type: str = "adamw"
    """adamw, muon (matrices; AdamW for the rest) or sgd."""
    lr: float = 1e-4
    muon_lr: float = 0.02
    momentum: float = 0.95
    """Of muon and sgd."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: str = "constant"
    """Learning rate after the warm-up: constant, cosine or linear (both to zero at train.steps)."""
    clip: float = 50.0
    """Largest gradient norm; 0: none."""
    clip_from_step: int = 100
    """Clipping starts here: the first gradients set the scale and should not be cut."""

    def __post_init__(self):
        require_choice("optim.type", self.type, ("adamw", "muon", "sgd"))
        require_choice("optim.decay", self.decay, ("constant", "cosine", "linear"))
        require_positive("optim", self, "lr", "muon_lr", "eps")
        for name in ("weight_decay", "warmup_steps", "clip", "clip_from_step"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative.")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={list(self.betas)} must be two numbers in [0, 1).",
        )
        require(0 <= self.momentum < 1, f"optim.momentum={self.momentum} must lie in [0, 1).")
        require(
            not (self.type == "muon" and self.clip > 0),
            f"optim.clip={self.clip} with optim.type=muon would clip the orthogonalised updates, whose norm does not "
            "depend on the gradient's. Set optim.clip=0.",
        )


@dataclass(kw_only=True)
class EmaConfig:
    """Average of the trained weights, beta = (1 - 1/t)^(gamma + 1) (Karras et al., arXiv 2312.02696)."""

    gamma: float = 7.0
    start_step: int = 100

    def __post_init__(self):
        require_positive("ema", self, "gamma")


@dataclass(kw_only=True)
class DataConfig:
    root: str = MISSING
    """Folder that tools/prepare_data.py wrote, or where it was copied to: s3://bucket/set and the like."""
    split: str = "train"
    num_workers: int = 0
    """Processes that read ahead, of each training process; 0: none, for sets that fit into memory."""
    cache_dir: str | None = None
    """Folder for decompressed shards, shared by the processes of a machine; default: beside the shards, or the
    temporary folder for sets that are remote or read-only."""
    cache_gb: float | None = None
    """Limit of cache_dir in GiB; default: none, or 80 % of what is free for remote sets."""
    augment: bool = False
    """Crop at random places and mirror; for sets made with latents=online."""
    caption_dropout: float = 0.0
    """Probability to replace a prompt by the empty one, so that the model learns the unconditional velocity."""

    def __post_init__(self):
        require(0 <= self.caption_dropout < 1, f"data.caption_dropout={self.caption_dropout} must lie in [0, 1).")
        require(self.num_workers >= 0, f"data.num_workers={self.num_workers} must not be negative.")
        require(self.cache_gb is None or self.cache_gb > 0, f"data.cache_gb={self.cache_gb} must be greater than zero.")

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gb is None else int(self.cache_gb * 2**30)


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 64
    """Images per step over all processes."""
    micro_batch_size: int | None = None
    """Images per process and backward; default: all of the process's share at once."""
    seed: int = 0
    dtype: str = "fp32"
    """fp32 or bf16 (fp32 master weights in both)."""
    max_skipped: int = 5
    """Stop after this many steps in a row whose gradient was not finite."""

    def __post_init__(self):
        require_positive("train", self, "steps", "batch_size", "max_skipped")
        if self.micro_batch_size is not None:
            require_positive("train", self, "micro_batch_size")
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative.")
        require_choice("train.dtype", self.dtype, ("fp32", "bf16"))

    def accumulation(self, dp_size: int) -> tuple[int, int]:
        """(micro-batches per step, images per micro-batch and process) on dp_size processes."""
        require(
            self.batch_size % dp_size == 0,
            f"train.batch_size={self.batch_size} does not split over {dp_size} data-parallel processes. "
            f"Use a multiple of {dp_size}, or change launch.processes or parallel.tp.",
        )
        share = self.batch_size // dp_size
        micro = self.micro_batch_size or share
        require(
            share % micro == 0,
            f"train.micro_batch_size={micro} does not divide the {share} images of each process "
            f"(train.batch_size={self.batch_size} over {dp_size} processes).",
        )
        return share // micro, micro


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints (0: see every_minutes); the last step is always saved."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, by the clock of process 0; 0: see every. With both, whichever comes first."""
    asynchronous: bool = True
    """Write beside training; false: training waits until the checkpoint is on disk."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep the checkpoints whose step is a multiple of this as well; 0: none."""
    keep_best: int = 0
    """Keep so many checkpoints with the best values of best_metric as well."""
    best_metric: str = "loss_smooth"
    """A metric of metrics.jsonl, taken at the step of the checkpoint."""
    best_mode: str = "min"
    """min or max."""
    resume: bool | int | str = True
    """true: continue from the newest complete checkpoint of the run folder; false: start afresh; a step, or a checkpoint
    folder of this training: go back to it. What is not continued is set aside, not deleted."""

    def __post_init__(self):
        require_positive("checkpoint", self, "keep")
        for name in ("every", "every_minutes", "keep_every", "keep_best"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}={getattr(self, name)} must not be negative.")
        require_choice("checkpoint.best_mode", self.best_mode, ("min", "max"))
        require(
            self.resume != "" and (isinstance(self.resume, bool | str) or self.resume >= 0),
            f"checkpoint.resume={self.resume} is no step. Use true, false, a step or a checkpoint folder.",
        )

    @property
    def goes_back(self) -> bool:
        return not isinstance(self.resume, bool)


@dataclass(kw_only=True)
class ParallelConfig:
    tp: int = 1
    """Processes that share every layer (tensor parallelism), inside a node; the others are data-parallel under ZeRO-3."""
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters of fewer elements whole on every process: gathering them costs more than they weigh."""
    memory_efficient_linear: bool = True
    """Let no graph hold gathered weights between forward and backward. Costs time per layer that a small model feels."""
    offload_optimizer: bool = False
    """Keep fp32 masters, optimizer state and their average in host memory and update there: slower, for models that do not fit."""
    recompute_every: int = 0
    """Keep no activations of every n-th block and compute them again for the backward pass; 1: of all blocks, 0: of none."""

    def __post_init__(self):
        require_positive("parallel", self, "tp")
        require(self.recompute_every >= 0, f"parallel.recompute_every={self.recompute_every} must not be negative.")
