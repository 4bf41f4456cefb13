"""Typed configuration behind configs/: one dataclass per yaml group, and the checks that no yaml file can make.

A wrong key is Hydra's error, a wrong value is raised here as ValueError with the option to change.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from piflow_dist.checkpoint.files import write_atomic

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
BASELINES = ("meanflow", "shortcut_regression")
"""Objectives whose students predict one mean velocity for a segment (policy.type=mean)."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the value, the reason and the option to change."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{option}={value} is not known. Choose one of: {', '.join(choices)}.")


def require_positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0 and math.isfinite(value), f"{prefix}.{name}={value} must be a number greater than zero.")


ARCHITECTURES = ("qwen_image", "flux", "dit")
"""Of models/architecture.py; docs/new_model.md adds one."""


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of a transformer; the names are diffusers'. The defaults are Qwen-Image's."""

    architecture: str = "qwen_image"
    """qwen_image, flux (double and single blocks, pooled prompt) or dit (class labels)."""
    num_layers: int = 60
    num_single_layers: int = 0
    """flux: blocks on text and image tokens in one stream, after the num_layers double ones."""
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    latent_channels: int = 16
    """Channels of the codec's latent. The transformer sees 2 x 2 patches of it."""
    joint_attention_dim: int = 3584
    """Width of the prompt embeddings; of class labels, which are one-hot vectors: their number and one for none."""
    pooled_projection_dim: int = 0
    """flux: width of the pooled prompt, the first numbers of an embedding's first row."""
    axes_dims_rope: list[int] = field(default_factory=lambda: [16, 56, 56])
    """Channels of a head that turn with the frame, the row and the column; [] for dit, whose tokens know their place."""
    time_scale: float = 1000.0
    """dit: the network reads the noise level times this. 1 for SiT and REPA, 1000 for others."""
    guidance_embeds: bool = False
    """The guidance scale is an input of the network: a guidance-distilled teacher (as FLUX.1-dev is), and its student."""

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self):
        require_positive("model", self, "num_layers", "num_attention_heads", "attention_head_dim", "latent_channels")
        require_choice("model.architecture", self.architecture, ARCHITECTURES)
        match self.architecture:
            case "qwen_image":
                self.check_rotations()
            case "flux":
                self.check_rotations()
                require_positive("model", self, "num_single_layers", "pooled_projection_dim")
                require(
                    self.pooled_projection_dim <= self.joint_attention_dim,
                    f"model.pooled_projection_dim={self.pooled_projection_dim} exceeds model.joint_attention_dim="
                    f"{self.joint_attention_dim}, but the pooled prompt is a row of the prompt's embedding.",
                )
            case "dit":
                require_positive("model", self, "time_scale")
                require(
                    not self.axes_dims_rope and self.width % 4 == 0,
                    f"model.axes_dims_rope={list(self.axes_dims_rope)}, width {self.width}: model.architecture=dit adds fixed "
                    "positions, a quarter of the width for each sine and cosine. Set model.axes_dims_rope=[] and a multiple of 4.",
                )
                require(
                    not self.guidance_embeds,
                    "model.guidance_embeds=true: model.architecture=dit has no such input. Set it to false.",
                )

    def check_rotations(self) -> None:
        rope = sum(self.axes_dims_rope)
        require(
            len(self.axes_dims_rope) == 3 and rope == self.attention_head_dim,
            f"model.axes_dims_rope={list(self.axes_dims_rope)} sums to {rope}, but a head has "
            f"model.attention_head_dim={self.attention_head_dim} dimensions. Give three even numbers of that sum.",
        )
        require(
            all(axis % 2 == 0 for axis in self.axes_dims_rope),
            f"model.axes_dims_rope={list(self.axes_dims_rope)}: rotations act on pairs, every entry must be even.",
        )


@dataclass(kw_only=True)
class ScheduleConfig:
    """sigma = warp(tau); DESIGN section 3."""

    shift: float = 3.2
    dynamic: bool = False
    """Compute the shift from the number of image tokens instead (log-linear, 0.5 at 256 to 1.15 at 4,096 tokens)."""

    def __post_init__(self):
        require_positive("schedule", self, "shift")


@dataclass(kw_only=True)
class PolicyConfig:
    type: str = "gmflow"
    """gmflow (Gaussian mixture), dx (clean images on a time grid) or mean (one velocity for the whole segment: the baselines)."""
    num_components: int = 8
    """K of a GMFlow policy."""
    logstd_inner_dim: int = 1024
    num_nodes: int = 10
    """N of a DX policy."""
    mode: str = "grid"
    """DX: grid or polynomial."""

    def __post_init__(self):
        require_choice("policy.type", self.type, ("gmflow", "dx", "mean"))
        require_choice("policy.mode", self.mode, ("grid", "polynomial"))
        require_positive("policy", self, "num_components", "logstd_inner_dim")
        require(
            self.type == "dx" or self.mode == "grid",
            f"policy.mode={self.mode} is of DX policies, this one has policy.type={self.type}. Set policy.type=dx.",
        )
        require(self.num_nodes >= 2, f"policy.num_nodes={self.num_nodes} spans no interval. Use 2 or more.")


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters of mode=tied; the defaults are the published ones of Qwen-Image."""

    rank: int = 256
    alpha: float = 256.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.05
    targets: list[str] = field(
        default_factory=lambda: [
            r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
            r"time_text_embed\.timestep_embedder\.linear_[12]",
        ]
    )
    """Regular expressions for whole names of linear layers. The last block's text MLP, which nothing reads, is left out."""

    def __post_init__(self):
        require_positive("lora", self, "rank", "alpha")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must lie in [0, 1).")
        require(bool(self.targets), "lora.targets is empty: nothing but the head would learn. Name linear layers.")


@dataclass(kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance of the teacher; DESIGN section 4."""

    scale: float = 4.0
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Noise levels sigma between which guidance acts."""
    orthogonal: float = 0.0
    """Share of the update along the conditional clean image that is removed, 0 to 1."""

    def __post_init__(self):
        require(
            self.scale >= 1,
            f"distill.guidance.scale={self.scale} is below 1: guidance acts only above 1. Use 1 for none.",
        )
        require(len(self.interval) == 2, f"distill.guidance.interval={list(self.interval)} must be two numbers.")
        low, high = self.interval
        require(
            0 <= low < high <= 1, f"distill.guidance.interval={list(self.interval)} is not an interval inside [0, 1]."
        )
        require(0 <= self.orthogonal <= 1, f"distill.guidance.orthogonal={self.orthogonal} must lie in [0, 1].")


@dataclass(kw_only=True)
class MeanFlowConfig:
    """objective=meanflow (arXiv 2505.13447); the defaults are the published ones. docs/baselines.md"""

    velocity: str = "teacher"
    """Whose flow is averaged: teacher (its guided velocity) or data (eps - x_0, no teacher is asked)."""
    instant_share: float = 0.75
    """Share of images whose interval has length zero: there the student learns the velocity itself."""
    time_mean: float = -0.4
    """Both ends of an interval are drawn in schedule time tau, logit-normal with this mean and time_std; the larger one is the start."""
    time_std: float = 1.0
    weight_power: float = 1.0
    """p of the adaptive weight 1 / (|error|^2 + weight_constant)^p of each image; 0: plain squares."""
    weight_constant: float = 1e-3

    def __post_init__(self):
        require_choice("distill.meanflow.velocity", self.velocity, ("teacher", "data"))
        require_positive("distill.meanflow", self, "time_std", "weight_constant")
        require(
            0 <= self.instant_share < 1,
            f"distill.meanflow.instant_share={self.instant_share} must lie in [0, 1): at 1 no mean velocity would be learnt.",
        )
        require(0 <= self.weight_power <= 1, f"distill.meanflow.weight_power={self.weight_power} must lie in [0, 1].")


@dataclass(kw_only=True)
class DistillConfig:
    """Imitation distillation (pi-ID); DESIGN section 4. The baselines share the teacher, its guidance and the segments."""

    teacher: str | None = None
    """Run folder or checkpoint folder of the teacher."""
    nfe: int = 4
    """Student network evaluations per image."""
    final_step_size_scale: float = 0.5
    total_substeps: int = 128
    """Policy substeps over the whole trajectory. Cheap: no network call."""
    window_substeps: int = 3
    """Substeps over which the policy's velocity is averaged before it is compared with the teacher's."""
    num_intermediate_states: int = 2
    """Teacher evaluations per segment."""
    num_decay_iters: int = 0
    """Steps over which teacher_ratio falls from 1 to 0 (scheduled mixing); 0: the student's own trajectory throughout."""
    loss_scale: float = 30.0
    component_dropout: float = 0.1
    """Probability to drop a mixture component from the trajectory's policy, per image (gmflow)."""
    stack_teacher_states: bool = True
    """Evaluate the teacher once on all intermediate states of a segment where they do not depend on its answers."""
    teacher_substeps: int = 8
    """objective=shortcut_regression: Euler steps of the teacher through a segment, the way to the end point that is regressed."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    meanflow: MeanFlowConfig = field(default_factory=MeanFlowConfig)

    @property
    def base_segment(self) -> float:
        """Length in tau of every segment but the last."""
        return 1 / (self.nfe - 1 + self.final_step_size_scale)

    def __post_init__(self):
        require_positive(
            "distill", self, "nfe", "total_substeps", "num_intermediate_states", "loss_scale", "teacher_substeps"
        )
        require(
            0 < self.final_step_size_scale <= 1,
            f"distill.final_step_size_scale={self.final_step_size_scale} must lie in (0, 1].",
        )
        require(
            0 <= self.component_dropout < 1, f"distill.component_dropout={self.component_dropout} must lie in [0, 1)."
        )
        require(self.num_decay_iters >= 0, f"distill.num_decay_iters={self.num_decay_iters} must not be negative.")
        last = self.final_step_size_scale / (self.nfe - 1 + self.final_step_size_scale) * self.total_substeps
        require(
            0 <= self.window_substeps < last,
            f"distill.window_substeps={self.window_substeps} does not fit into the last of distill.nfe={self.nfe} "
            f"segments, which has {last:.1f} of distill.total_substeps={self.total_substeps} substeps. "
            f"Use a smaller window or more substeps.",
        )


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


@dataclass(kw_only=True)
class LaunchConfig:
    processes: int = 1
    """Processes on this machine: one per GPU, or one per few CPU cores. With +cluster= all GPUs of its nodes, whatever is given here."""
    device: str = "auto"
    """auto, cpu or cuda."""
    start: str = "fresh"
    """fresh: every process is an interpreter of its own; fork: a copy of the launcher, which saves the seconds of imports
    where a tool starts many small runs (on CPU alone: CUDA does not survive a fork)."""
    threads: int | None = None
    """CPU threads per process; default: the cores shared out."""
    port: int = 0
    """Rendezvous port; 0 finds a free one."""
    timeout_seconds: int = 600
    """Time limit of a collective."""
    dry_run: bool = False
    """Check everything and stop."""
    log_level: str = "INFO"
    """Of the package's messages: DEBUG, INFO, WARNING or ERROR."""
    hours: float = 24.0
    """+cluster: time limit of the job, which goes on after it by itself."""
    warning_seconds: int = 300
    """Time for the step under way and a save: a job is told so long before its limit to stop, a run here has so long after a signal."""
    must_fit: bool = True
    """+cluster: refuse to submit what does not fit by the planner (tools/plan.py)."""
    follow: bool = False
    """+cluster: show the job's log until it ends."""

    def __post_init__(self):
        require_positive("launch", self, "processes", "timeout_seconds", "hours", "warning_seconds")
        require_choice("launch.log_level", self.log_level, ("DEBUG", "INFO", "WARNING", "ERROR"))
        require_choice("launch.device", self.device, ("auto", "cpu", "cuda"))
        require_choice("launch.start", self.start, ("fresh", "fork"))
        require(
            self.start == "fresh" or self.device == "cpu",
            f"launch.start={self.start} with launch.device={self.device}: CUDA does not survive a fork. Set launch.device=cpu.",
        )
        require(self.threads is None or self.threads > 0, f"launch.threads={self.threads} must be greater than zero.")
        require(0 <= self.port < 65536, f"launch.port={self.port} is not a port. Use 0 for a free one.")


@dataclass(kw_only=True)
class WatchdogConfig:
    """When a training process is taken to hang: the job ends with its rank, step, phase and stacks in the log."""

    factor: float = 10.0
    """A step may take so many times the median of the last steps; 0: no watchdog."""
    minimum_seconds: float = 300.0
    """No step is taken to hang sooner, however fast the others are."""
    startup_seconds: float = 3600.0
    """Limit of what is no step (loading, saving) and of the first steps."""
    steps_before: int = 3
    """First steps, which compile, allocate and connect."""

    def __post_init__(self):
        require_positive("watchdog", self, "minimum_seconds", "startup_seconds", "steps_before")
        require(
            self.factor == 0 or self.factor > 1,
            f"watchdog.factor={self.factor} would end steps that take no longer than others. Use 10 or so, or 0 for none.",
        )


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines of a run, for plans and submission: one file of configs/cluster/ each. GB is 1e9 bytes, GiB 2^30."""

    nodes: int = MISSING
    gpus_per_node: int = MISSING
    """Processes per node: one per GPU, or per share of its cores where device=cpu."""
    gpu: str = MISSING
    """What a process computes on, for people."""
    scheduler: str = "slurm"
    """slurm: runs are submitted; none: they run on this machine."""
    device: str = "cuda"
    """cuda or cpu."""
    gpu_memory_gib: float = MISSING
    """Memory of a process's device that programs can have."""
    peak_tflops: float = MISSING
    """Dense bf16 matrix products per GPU."""
    achieved_share: float = 0.45
    """Share of peak_tflops that a step's arithmetic reaches."""
    intra_node_gb_s: float = MISSING
    """Bandwidth of a GPU to the others of its node, one direction, as collectives reach it."""
    inter_node_gb_s: float = MISSING
    """Bandwidth of a whole node to the others, one direction."""
    host_memory_gib: float = MISSING
    """Memory of a node."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __post_init__(self):
        require_choice("cluster.device", self.device, ("cuda", "cpu"))
        require_choice("cluster.scheduler", self.scheduler, ("slurm", "none"))
        sizes = ("nodes", "gpus_per_node", "gpu_memory_gib", "peak_tflops", "host_memory_gib")
        require_positive("cluster", self, *sizes, "intra_node_gb_s", "inter_node_gb_s")
        require(0 < self.achieved_share <= 1, f"cluster.achieved_share={self.achieved_share} must lie in (0, 1].")


@dataclass(kw_only=True)
class TrackingConfig:
    enabled: bool = True
    uri: str | None = None
    """MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db (SQLite) beside the run folder."""
    experiment: str = "piflow_dist"
    log_every: int = 10
    """Steps between console lines, MLflow batches and the figures that are means over steps; every step goes to metrics.jsonl."""
    peak_tflops: float | None = None
    """Dense bf16 matrix products per GPU, for the share of it that a step reaches; default: cluster.peak_tflops."""
    probe_every: int = 0
    """Steps between probes of the policy's end points against the teacher's trajectory (nfe student evaluations each); 0: none."""
    probe_images: int = 2
    """Images of the probe, per data-parallel rank."""
    patience_seconds: float = 20.0
    """How long the end of a training waits for MLflow to take the rest; training itself never waits."""
    sweep: str | None = None
    """Folder of the sweep that the run is of (set by -m): the trainings in it are children of one MLflow run."""

    def __post_init__(self):
        require_positive("tracking", self, "log_every", "probe_images", "patience_seconds")
        require(self.probe_every >= 0, f"tracking.probe_every={self.probe_every} must not be negative. Use 0 for none.")
        if self.peak_tflops is not None:
            require_positive("tracking", self, "peak_tflops")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Images from fixed prompts and noises while training goes on, beside the teacher's (docs/evaluation.md)."""

    every: int = 0
    """Steps between evaluations; 0: none."""
    prompts: str | None = None
    """Text file, one prompt a line; default: the captions that the data set lists."""
    max_prompts: int = 8
    """The first so many of them."""
    images_per_prompt: int = 2
    """From two on the diversity within a prompt can be told."""
    seed: int = 0
    """Of the noises: the same at every evaluation."""
    ema: bool = True
    """Averaged weights, or the raw ones."""
    nfe: int | None = None
    """Student evaluations per image; default: as trained."""
    temperature: str = "auto"
    """Of a GMFlow student, at every step but the last: a number, or auto = 0.1 (nfe - 1)."""
    teacher_steps: int = 50
    """Euler steps of the teacher's images, which are made once a process; of a teacher in training, of all its images."""
    guidance: float = 1.0
    """Guidance scale of a teacher in training; a student's teacher has distill.guidance."""
    batch_size: int = 8
    """Images per process and forward pass."""

    def __post_init__(self):
        require_positive("evaluation", self, "max_prompts", "images_per_prompt", "teacher_steps", "batch_size")
        require(self.every >= 0, f"evaluation.every={self.every} must not be negative. Use 0 for none.")
        require(self.guidance >= 1, f"evaluation.guidance={self.guidance} is below 1. Use 1 for none.")
        if self.temperature != "auto":
            try:
                valid = 0 < float(self.temperature) <= 1
            except ValueError:
                valid = False
            require(valid, f"evaluation.temperature={self.temperature} must be auto or a number in (0, 1].")


@dataclass(kw_only=True)
class Config:
    """One training run."""

    run_dir: str = MISSING
    """Everything the run writes goes here; the same folder resumes it."""
    objective: str = "imitation"
    """flow_matching (a teacher), imitation (pi-ID on data), imitation_datafree (pi-ID from noise), or a baseline beside it: meanflow or
    shortcut_regression (the teacher's end point of each segment)."""
    mode: str = "full"
    """full (every weight is trained, beside a frozen teacher) or tied (adapters and a head on the teacher's own weights)."""
    init_from: str | None = None
    """A student to start from, with a fresh optimizer: a run or checkpoint folder, an exported adapter or merged transformer."""
    init_ema: bool = True
    """Start from the averaged weights of init_from, or from the raw ones."""
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig | None = None
    """Where the run is to happen (+cluster=NAME): decides launch.processes and launch.device. None: this machine."""

    def check_parallel(self) -> None:
        tp, processes, heads = self.parallel.tp, self.launch.processes, self.model.num_attention_heads
        if self.cluster is not None:
            require(
                tp <= self.cluster.gpus_per_node,
                f"parallel.tp={tp} exceeds a node of {self.cluster.gpus_per_node} GPUs (cluster.gpus_per_node): the group "
                "would sum every layer's outputs over the slow links between nodes. Choose a smaller parallel.tp.",
            )
            require(
                self.cluster.gpus_per_node % tp == 0,
                f"parallel.tp={tp} does not divide a node's {self.cluster.gpus_per_node} GPUs (cluster.gpus_per_node): a "
                "group would span two nodes. Choose a divisor.",
            )
        require(
            processes % tp == 0,
            f"launch.processes={processes} are not whole tensor-parallel groups of parallel.tp={tp}. "
            "Choose a multiple of parallel.tp.",
        )
        require(
            heads % tp == 0,
            f"parallel.tp={tp} does not divide the model's {heads} attention heads (model.num_attention_heads). "
            f"Choose one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}.",
        )
        require(
            tp == 1 or self.optim.type != "muon",
            f"optim.type=muon orthogonalises whole matrices, which parallel.tp={tp} splits. Use optim.type=adamw.",
        )
        require(
            not (self.parallel.offload_optimizer and self.optim.type == "muon"),
            "parallel.offload_optimizer=true: optim.type=muon orthogonalises on the GPU. Use optim.type=adamw.",
        )
        self.train.accumulation(processes // tp)

    @property
    def distils(self) -> bool:
        return self.objective != "flow_matching"

    def check_baselines(self) -> None:
        baseline, mean = self.objective in BASELINES, self.policy.type == "mean"
        require(
            mean or not baseline,
            f"objective={self.objective} learns one mean velocity for a segment, policy.type={self.policy.type} is another kind of "
            "output. Set policy=mean.",
        )
        require(
            baseline or not mean or not self.distils,
            f"policy.type=mean has one velocity for a segment, and objective={self.objective} compares velocities inside of it. "
            f"Set policy=gmflow or policy=dx, or objective={' or '.join(BASELINES)}.",
        )
        scale = self.distill.guidance.scale
        require(
            self.objective != "meanflow" or self.distill.meanflow.velocity == "teacher" or scale == 1,
            f"distill.guidance.scale={scale} guides a teacher, and distill.meanflow.velocity=data asks none. "
            "Set distill.guidance.scale=1, or distill.meanflow.velocity=teacher.",
        )

    def __post_init__(self):
        require_choice("objective", self.objective, ("flow_matching", "imitation", "imitation_datafree", *BASELINES))
        require_choice("mode", self.mode, ("full", "tied"))
        require(
            self.distils or self.mode == "full",
            f"mode={self.mode} ties a student to its teacher, but objective={self.objective} trains a teacher. Set mode=full.",
        )
        if self.cluster is not None:
            self.launch.processes, self.launch.device = self.cluster.world_size, self.cluster.device
        require(
            self.distils or self.init_from is None,
            f"init_from={self.init_from} is for students, but objective={self.objective} trains a teacher. Set init_from=null.",
        )
        self.check_parallel()
        self.check_baselines()
        if self.distils and self.evaluation.nfe is not None:
            require(
                self.evaluation.nfe == self.distill.nfe
                or (self.policy.type == "gmflow" and self.evaluation.nfe > self.distill.nfe),
                f"evaluation.nfe={self.evaluation.nfe}: a student of distill.nfe={self.distill.nfe} is sampled at that many "
                "evaluations, a GMFlow one at more as well.",
            )
        if self.distils:
            require(
                bool(self.distill.teacher),
                f"objective={self.objective} needs a teacher. Set distill.teacher to a teacher's run folder.",
            )
            require(
                self.data.caption_dropout == 0,
                f"data.caption_dropout={self.data.caption_dropout} is for teachers: a student imitates the guided "
                f"velocity at the given prompt. Set data.caption_dropout=0 with objective={self.objective}.",
            )
        else:
            require(
                not self.model.guidance_embeds,
                "model.guidance_embeds=true: flow matching does not teach a network what its guidance input means. "
                "Set model.guidance_embeds=false with objective=flow_matching.",
            )
        if self.model.guidance_embeds:
            guidance = self.distill.guidance
            require(
                list(guidance.interval) == [0, 1] and guidance.orthogonal == 0,
                f"distill.guidance.interval={list(guidance.interval)} and distill.guidance.orthogonal="
                f"{guidance.orthogonal} act on two velocities, but a network with model.guidance_embeds=true answers with "
                "the guided one. Set distill.guidance.interval=[0,1] and distill.guidance.orthogonal=0.",
            )


def load_config(overrides: list[str], schema: type = Config, name: str = "train") -> Any:
    """Compose configs/<name>.yaml with Hydra overrides into a checked `schema` object.

    Raises ConfigError with a message for people where a key is unknown or a value cannot work.
    """
    chosen = next((override for override in overrides if override.startswith("cluster=")), None)
    require(chosen is None, f"{chosen}: runs have no cluster unless one is added. Write +{chosen}.")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed = compose(name, overrides=list(overrides))
        missing = sorted(OmegaConf.missing_keys(composed))
        hint = " Choose a run with experiment=NAME, or" if name == "train" else ""
        adding = f"{'add' if hint else 'Add'} {' '.join(f'{key}=VALUE' for key in missing)}"
        require(not missing, f"No value for {', '.join(missing)}.{hint} {adding}.")
        return OmegaConf.to_object(composed)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's answer to group=null
        raise ConfigError(explain(error, OmegaConf.structured(schema))) from error


def explain(error: Exception, structured: Any) -> str:
    """Hydra's message, and what exists at the place where it looked."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = first_line(cause).rstrip(".")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group = Path(str(error.missing_cfg_file)).parent
        return f"{text}. Choose one of: {', '.join(sorted(path.stem for path in (CONFIG_DIR / group).glob('*.yaml')))}."
    key = getattr(cause, "full_key", None)
    if not key:
        return f"{text}."
    parent = OmegaConf.select(structured, key.rpartition(".")[0]) if "." in key else structured
    names = ", ".join(str(name) for name in parent) if isinstance(parent, DictConfig) else ""
    return f"{key}: {text}." + (f" Keys there: {names}." if names else "")


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration; a reader sees the old file or the new one."""
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_config(path: Path, schema: type = Config) -> Any:
    """The resolved configuration that a run saved. Raises ConfigError where the file cannot be read as one."""
    try:
        return config_from(OmegaConf.load(path), schema)
    except (OSError, YAMLError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read as saved settings: {first_line(error)}") from error


def config_from(values: Any, schema: type = Config) -> Any:
    """Plain nested values, as saved, -> a checked configuration. Raises ConfigError where they are not one."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(first_line(error)) from error


def config_values(config: Any) -> dict[str, Any]:
    """The configuration as plain nested values, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def changed_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every value that differs between two configurations."""
    changed = {}
    for item in dataclasses.fields(new):
        before, after, key = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if dataclasses.is_dataclass(after) and dataclasses.is_dataclass(before):
            changed |= changed_keys(before, after, key + ".")
        elif before != after:
            changed[key] = (before, after)
    return changed


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
