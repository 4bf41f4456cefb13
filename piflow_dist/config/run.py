"""One training run: all groups, and the checks between them."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from piflow_dist.config.checks import require, require_choice
from piflow_dist.config.distill import BASELINES, DistillConfig
from piflow_dist.config.model import LoraConfig, ModelConfig, PolicyConfig, ScheduleConfig
from piflow_dist.config.running import ClusterConfig, EvaluationConfig, LaunchConfig, TrackingConfig, WatchdogConfig
from piflow_dist.config.training import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)


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
                or self.objective == "meanflow"
                or (self.policy.type == "gmflow" and self.evaluation.nfe > self.distill.nfe),
                f"evaluation.nfe={self.evaluation.nfe}: a student of distill.nfe={self.distill.nfe} is sampled at that many "
                "evaluations, a GMFlow one at more as well, one of objective=meanflow at any number.",
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
