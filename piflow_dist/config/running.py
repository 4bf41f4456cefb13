"""Of what is around the loop: processes and clusters, the watchdog, tracking, evaluation beside training."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from piflow_dist.config.checks import require, require_choice, require_interval, require_positive


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
    probe_images: int = 4
    """Images of the probe, over all ranks: the same ones on any number of them."""
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
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Noise levels sigma between which that guidance acts."""
    batch_size: int = 8
    """Images per process and forward pass."""

    def __post_init__(self):
        require_positive("evaluation", self, "max_prompts", "images_per_prompt", "teacher_steps", "batch_size")
        require(self.every >= 0, f"evaluation.every={self.every} must not be negative. Use 0 for none.")
        require(self.guidance >= 1, f"evaluation.guidance={self.guidance} is below 1. Use 1 for none.")
        require_interval("evaluation.guidance_interval", self.guidance_interval)
        if self.nfe is not None:
            require_positive("evaluation", self, "nfe")
        if self.temperature != "auto":
            try:
                valid = 0 < float(self.temperature) <= 1
            except ValueError:
                valid = False
            require(valid, f"evaluation.temperature={self.temperature} must be auto or a number in (0, 1].")
