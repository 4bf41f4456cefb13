"""Imitation of a teacher by a policy along its own trajectory (pi-ID), for one segment.

B batch, C latent channels, H W latent size (a frame axis may stand before them), M intermediate states. tau is schedule time,
sigma the noise level; both run from 1 (noise) down to 0. Source: pi-Flow (arXiv 2510.14974).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import DXPolicy, GMFlowPolicy, rollout, windowed_velocities

Policy = GMFlowPolicy | DXPolicy
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ImitationSettings:
    num_intermediate_states: int = 2
    """M: states per segment at which the teacher is asked."""
    window_substeps: int = 3
    """Substeps over which the policy's velocity is averaged; 0 takes its local velocity."""
    total_substeps: int = 128
    """Policy substeps over the whole trajectory. Cheap: no network call."""
    loss_scale: float = 30.0
    """30 for Qwen-Image, 3 for ImageNet."""
    stack_teacher_states: bool = False
    """Ask the teacher once for all M states where teacher_ratio is 0. Faster; needs the memory of a batch of M * B."""

    def __post_init__(self):
        if self.num_intermediate_states < 1 or self.total_substeps < 1 or self.window_substeps < 0:
            raise ValueError(f"num_intermediate_states={self.num_intermediate_states}, total_substeps={self.total_substeps}, "
                             f"window_substeps={self.window_substeps}: the first two must be at least 1, the last at least 0.")


@dataclass(frozen=True, kw_only=True)
class ImitationOutput:
    loss: Tensor
    """Scalar: loss_scale/2 times the mean square of prediction - target."""
    loss_B: Tensor
    """The same per sample, detached."""
    prediction: Tensor
    """(M, B, C, H, W): mean velocities of the attached policy."""
    target: Tensor
    """(M, B, C, H, W): the teacher's velocities."""
    sigma_MB: Tensor
    """Noise levels of the states the teacher was asked at."""
    _finish: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def x_end(self) -> Tensor:
        """End of the segment: the detached policy followed on from the last state. Formed when asked for (data-free)."""
        return self._finish()


def imitation_segment(policy: Policy, teacher_velocity: Velocity, x_src_BCHW: Tensor, tau_src_B: Tensor,
                      segment_size_B: Tensor | float, schedule: FlowSchedule, settings: ImitationSettings,
                      student_uniforms_BM: Tensor | None = None, teacher_uniforms_BM1: Tensor | None = None,
                      teacher_ratio: float = 0.0, generator: torch.Generator | None = None,
                      rollout_policy: Policy | None = None) -> ImitationOutput:
    """The pi-ID loss on the segment of length segment_size (in tau) that starts at (x_src, tau_src).

    policy: the student's, with gradients, made at (x_src, warp(tau_src)). rollout_policy: picks the states that are visited;
    policy.detach() where None, or for example policy.detach().with_dropout(0.1, generator).
    teacher_velocity(x_BCHW, sigma_B): the teacher, guidance included; called without gradients, M times in falling sigma, or
    once on (M * B, ...), state after state, with settings.stack_teacher_states and teacher_ratio 0.
    teacher_ratio: share r of the segment that is walked along the teacher's velocity instead of the policy's.
    student_uniforms_BM: (B, M) in [0, 1], in any order; sorted and scaled to [0, (1-r)(L-w)], their differences are the
    student intervals. teacher_uniforms_BM1: (B, M-1) in [0, 1], in any order; they cut [0, r(L-w)] into M teacher intervals.
    Both are drawn from the generator (student first, teacher always too) where not given.
    The window w is window_substeps of the segment's substeps, each L / max(1, round(L * total_substeps)), and at most L.
    """
    if not 0 <= teacher_ratio <= 1:
        raise ValueError(f"teacher_ratio={teacher_ratio} is a share of the segment: it must be in [0, 1].")
    if rollout_policy is None:
        rollout_policy = policy.detach()
    student_MB, teacher_MB, window_B, tau_dst_B = _intervals(
        x_src_BCHW, tau_src_B, segment_size_B, settings, student_uniforms_BM, teacher_uniforms_BM1, teacher_ratio, generator)
    stack = settings.stack_teacher_states and teacher_ratio == 0

    states, targets, sigmas, spans = [], [], [], []
    x_BCHW, tau_B = x_src_BCHW, tau_src_B
    with torch.no_grad():
        for student_B, teacher_B in zip(student_MB, teacher_MB, strict=True):
            tau_a_B = (tau_B - student_B).clamp(min=0)
            tau_b_B = (tau_a_B - teacher_B).clamp(min=0)
            x_BCHW, sigma_a_B = rollout(rollout_policy, x_BCHW, tau_B, tau_a_B, schedule, settings.total_substeps)
            states.append(x_BCHW)
            sigmas.append(sigma_a_B)
            spans.append((tau_a_B, (tau_b_B - window_B).clamp(min=0)))
            if not stack:
                targets.append(teacher_velocity(x_BCHW, sigma_a_B).to(x_BCHW.dtype))
            if teacher_ratio > 0:
                step_B = schedule.warp(tau_b_B) - schedule.warp(tau_a_B)
                x_BCHW = x_BCHW + step_B.to(x_BCHW.dtype).reshape((-1,) + (1,) * (x_BCHW.dim() - 1)) * targets[-1]
            tau_B = tau_b_B
        if stack:
            u = teacher_velocity(torch.cat(states), torch.cat(sigmas)).to(x_BCHW.dtype)
            targets = u.chunk(len(states))
    predictions = windowed_velocities(policy, states, spans, schedule, settings.total_substeps)

    @torch.no_grad()
    def finish() -> Tensor:
        end_B = torch.minimum(tau_dst_B, tau_B)    # equal up to rounding where no window is left
        return rollout(rollout_policy, x_BCHW, tau_B, end_B, schedule, settings.total_substeps)[0]

    prediction, target = torch.stack(predictions), torch.stack(list(targets))
    square = (prediction - target).square()
    per_sample_B = square.detach().transpose(0, 1).flatten(1).mean(1) * (settings.loss_scale / 2)
    return ImitationOutput(loss=square.mean() * (settings.loss_scale / 2), loss_B=per_sample_B, prediction=prediction,
                           target=target, sigma_MB=torch.stack(sigmas), _finish=finish)


def _intervals(x_BCHW, tau_src_B, segment_size_B, settings, student_uniforms_BM, teacher_uniforms_BM1, ratio, generator):
    """(student intervals (M, B), teacher intervals (M, B), window (B,), end of the segment (B,)), all in tau."""
    batch, M, device = len(x_BCHW), settings.num_intermediate_states, x_BCHW.device
    size_B = torch.as_tensor(segment_size_B, dtype=tau_src_B.dtype, device=device).flatten().expand(batch)
    substep_B = size_B / torch.round(size_B * settings.total_substeps).clamp(min=1)
    window_B = torch.minimum(settings.window_substeps * substep_B, size_B)

    def uniforms(given: Tensor | None, count: int, name: str) -> Tensor:
        if given is None:
            where = device if generator is None else generator.device
            given = torch.rand((batch, count), generator=generator, device=where)
        elif given.shape != (batch, count):
            raise ValueError(f"{name} of shape {tuple(given.shape)}: expected ({batch}, {count}) for {batch} samples and "
                             f"distill.num_intermediate_states={M}.")
        return given.to(device, tau_src_B.dtype).sort(1)[0]

    student_BM = uniforms(student_uniforms_BM, M, "student_uniforms_BM")
    teacher_BM1 = uniforms(teacher_uniforms_BM1, M - 1, "teacher_uniforms_BM1")
    zero_B1, one_B1 = student_BM.new_zeros(batch, 1), student_BM.new_ones(batch, 1)
    room_B1 = (size_B - window_B).unsqueeze(1)
    student_BM = (student_BM * ((1 - ratio) * room_B1)).diff(dim=1, prepend=zero_B1)
    teacher_BM = teacher_BM1.diff(dim=1, prepend=zero_B1, append=one_B1) * (ratio * room_B1)
    return student_BM.unbind(1), teacher_BM.unbind(1), window_B, (tau_src_B - size_B).clamp(min=0)
