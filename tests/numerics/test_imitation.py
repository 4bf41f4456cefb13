"""imitation_segment with fixed uniforms against a Python loop over samples, states and substeps."""

from dataclasses import dataclass, field

import pytest
import torch

from piflow_dist.distill.imitation import ImitationSettings, imitation_segment
from piflow_dist.flow.schedule import FlowSchedule

from .cases import F64, dx_arrays, gm_arrays, per_sample, relative_error_B, rng
from .reference import Imitation, imitate, warp

SHIFT = 3.2
SCHEDULE = FlowSchedule(shift=SHIFT)
# Four steps with the last one halved, the third sample in the last; the fourth is a segment of another size.
TAU_SRC = [1.0, 3 / 7, 1 / 7, 0.8]
SEGMENTS = [2 / 7, 2 / 7, 1 / 7, 0.37]


def teacher(x, sigma):
    """Some velocity that bends in x and sigma; sigma: (B,) for a batch, or a float for one sample."""
    batched = isinstance(sigma, torch.Tensor)
    sigma = per_sample(sigma, x) if batched else sigma
    return torch.tanh(1.3 * x.roll(1, -1)) - 0.5 * sigma * x + torch.cos(4 * x.roll(1, -2) * sigma)


def arrays_for(kind: str):
    sources = [warp(tau, SHIFT) for tau in TAU_SRC]
    if kind == "gm":
        return gm_arrays(sources, components=3, channels=2, space=(2, 3), seed=70)
    if kind == "gm frames":
        return gm_arrays(sources, components=3, channels=2, space=(2, 1, 3), seed=71)
    return dx_arrays(sources, mode=kind.split()[1], nodes=4, channels=2, space=(2, 3), segment_size=2 / 7, seed=72)


@dataclass
class Setup:
    """Everything that fixes one call."""

    kind: str = "gm"
    ratio: float = 0.0
    states: int = 2
    window: int = 3
    total: int = 128
    scale: float = 30.0
    stack: bool = False
    drop: bool = False
    dtype: torch.dtype = F64
    seed: int = 80
    uniforms: torch.Tensor = field(init=False)
    cuts: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.uniforms = torch.rand(len(TAU_SRC), self.states, generator=rng(self.seed), dtype=F64).to(self.dtype)
        self.cuts = torch.rand(len(TAU_SRC), self.states - 1, generator=rng(self.seed + 1), dtype=F64).to(self.dtype)

    def frozen_arrays(self, arrays):
        """The detached policy that picks the states may have lost components."""
        frozen = arrays.leaves()
        if self.drop:
            frozen.logweights = frozen.logweights.detach().clone()
            frozen.logweights[0, 1] = frozen.logweights[3, 2] = -torch.inf
        return frozen

    def package(self, arrays):
        settings = ImitationSettings(num_intermediate_states=self.states, window_substeps=self.window, total_substeps=self.total,
                                     loss_scale=self.scale, stack_teacher_states=self.stack)  # fmt: skip
        options = {"rollout_policy": self.frozen_arrays(arrays).package().detach()} if self.drop else {}
        return imitation_segment(
            arrays.package(), teacher, arrays.x_src, torch.tensor(TAU_SRC, dtype=self.dtype),
            torch.tensor(SEGMENTS, dtype=self.dtype), SCHEDULE, settings, student_uniforms_BM=self.uniforms,
            teacher_uniforms_BM1=self.cuts, teacher_ratio=self.ratio, **options,
        )  # fmt: skip

    def reference(self, arrays) -> list[Imitation]:
        frozen = self.frozen_arrays(arrays).reference()
        return [
            imitate(policy, teacher, arrays.x_src[b].double(), TAU_SRC[b], SEGMENTS[b], SHIFT, window_substeps=self.window,
                    total_substeps=self.total, ratio=self.ratio, student_uniforms=self.uniforms[b].tolist(),
                    teacher_cuts=self.cuts[b].tolist(), frozen=frozen[b].detach())
            for b, policy in enumerate(arrays.reference())
        ]  # fmt: skip
