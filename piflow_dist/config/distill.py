"""Of distillation: guidance of the teacher, imitation, and the baselines beside it."""

from dataclasses import dataclass, field

from piflow_dist.config.checks import require, require_choice, require_interval, require_positive

BASELINES = ("meanflow", "shortcut_regression")
"""Objectives whose students predict one mean velocity for a segment (policy.type=mean)."""


@dataclass(kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance of the teacher (flow/guidance.py)."""

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
        require_interval("distill.guidance.interval", self.interval)
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
    """Imitation distillation (pi-ID). The baselines share the teacher, its guidance and the segments."""

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
