"""Imitation of a teacher by a policy along its own trajectory (pi-ID), for one segment.

B batch, C latent channels, H W latent size (a frame axis may stand before them), M intermediate states. tau is schedule
time, sigma the noise level; both run from 1 (noise) down to 0. Source: pi-Flow (arXiv 2510.14974).
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
        for name, least in (("num_intermediate_states", 1), ("window_substeps", 0), ("total_substeps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be at least {least}.")


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
    finish: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def x_end(self) -> Tensor:
        """End of the segment: the detached policy followed on from the last state. Formed when first read."""
        return self.finish()


def imitation_segment(
    policy: Policy,
    teacher_velocity: Velocity,
    x_src_BCHW: Tensor,
    tau_src_B: Tensor,
    segment_size_B: Tensor | float,
    schedule: FlowSchedule,
    settings: ImitationSettings,
    student_uniforms_BM: Tensor | None = None,
    teacher_uniforms_BM1: Tensor | None = None,
    teacher_ratio: float = 0.0,
    generator: torch.Generator | None = None,
    rollout_policy: Policy | None = None,
) -> ImitationOutput:
    """The pi-ID loss on the segment of length segment_size (in tau) that starts at (x_src, tau_src).

    policy: the student's, with gradients, made at (x_src, warp(tau_src)).
    rollout_policy: picks the states that are visited; policy.detach() where None, or with component dropout
    policy.detach().with_dropout(0.1, generator).
    teacher_velocity(x_BCHW, sigma_B): the teacher, guidance included; called without gradients, M times in falling
    sigma; or once on (M * B, ...), state after state, with settings.stack_teacher_states and teacher_ratio 0.
    teacher_ratio: share r of the segment that is walked along the teacher's velocity instead of the policy's.
    student_uniforms_BM: (B, M) in [0, 1], in any order; sorted and scaled to [0, (1-r)(L-w)], where their differences
    are the student intervals. teacher_uniforms_BM1: (B, M-1) in [0, 1], in any order; they cut [0, r(L-w)] into the M
    teacher intervals. Drawn from the generator where not given: the student's first, the teacher's at any ratio.
    The window w is window_substeps times the segment's substep, L / max(1, round(L * total_substeps)); at most L.
    """
    if not 0 <= teacher_ratio <= 1:
        raise ValueError(f"teacher_ratio={teacher_ratio} is a share of the segment: it must be in [0, 1].")
    if rollout_policy is None:
        rollout_policy = policy.detach()
    size_B, window_B = _segment_and_window(x_src_BCHW, tau_src_B, segment_size_B, settings)
    student_MB, teacher_MB = _intervals(
        x_src_BCHW,
        size_B - window_B,
        settings.num_intermediate_states,
        teacher_ratio,
        student_uniforms_BM,
        teacher_uniforms_BM1,
        generator,
    )
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
                step_B = (schedule.warp(tau_b_B) - schedule.warp(tau_a_B)).to(x_BCHW.dtype)
                x_BCHW = x_BCHW + step_B.reshape((-1,) + (1,) * (x_BCHW.dim() - 1)) * targets[-1]
            tau_B = tau_b_B
        if stack:
            targets = teacher_velocity(torch.cat(states), torch.cat(sigmas)).to(x_BCHW.dtype).chunk(len(states))

    @torch.no_grad()
    def finish() -> Tensor:
        tau_dst_B = torch.minimum((tau_src_B - size_B).clamp(min=0), tau_B)  # rounding, where no window is left
        return rollout(rollout_policy, x_BCHW, tau_B, tau_dst_B, schedule, settings.total_substeps)[0]

    prediction = torch.stack(windowed_velocities(policy, states, spans, schedule, settings.total_substeps))
    target = torch.stack(list(targets))
    square = (prediction - target).square()
    loss_B = square.detach().transpose(0, 1).flatten(1).mean(1) * (settings.loss_scale / 2)
    return ImitationOutput(
        loss=square.mean() * (settings.loss_scale / 2),
        loss_B=loss_B,
        prediction=prediction,
        target=target,
        sigma_MB=torch.stack(sigmas),
        finish=finish,
    )


def _segment_and_window(
    x_BCHW: Tensor, tau_src_B: Tensor, segment_size_B: Tensor | float, settings: ImitationSettings
) -> tuple[Tensor, Tensor]:
    """Length of the segment and of the averaging window, (B,) each, in tau."""
    if isinstance(segment_size_B, Tensor):
        size_B = segment_size_B.to(x_BCHW.device, tau_src_B.dtype).flatten().expand(len(x_BCHW))
    else:
        size_B = torch.full_like(tau_src_B, segment_size_B)
    substep_B = size_B / torch.round(size_B * settings.total_substeps).clamp(min=1)
    return size_B, torch.minimum(settings.window_substeps * substep_B, size_B)


def _intervals(
    x_BCHW: Tensor,
    room_B: Tensor,
    M: int,
    ratio: float,
    student_uniforms_BM: Tensor | None,
    teacher_uniforms_BM1: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Student and teacher intervals, M times (B,) each, in tau. room_B: length of the segment less the window."""
    batch = len(x_BCHW)

    def uniforms(given: Tensor | None, count: int, name: str) -> Tensor:
        if given is None:
            device = x_BCHW.device if generator is None else generator.device
            given = torch.rand((batch, count), generator=generator, device=device)
        elif given.shape != (batch, count):
            raise ValueError(
                f"{name} of shape {tuple(given.shape)}: expected ({batch}, {count}) for {batch} samples "
                f"and distill.num_intermediate_states={M}."
            )
        return given.to(room_B.device, room_B.dtype).sort(1)[0]

    student_BM = uniforms(student_uniforms_BM, M, "student_uniforms_BM")
    teacher_BM1 = uniforms(teacher_uniforms_BM1, M - 1, "teacher_uniforms_BM1")
    zero_B1, one_B1, room_B1 = student_BM.new_zeros(batch, 1), student_BM.new_ones(batch, 1), room_B.unsqueeze(1)
    student_BM = (student_BM * ((1 - ratio) * room_B1)).diff(dim=1, prepend=zero_B1)
    teacher_BM = teacher_BM1.diff(dim=1, prepend=zero_B1, append=one_B1) * (ratio * room_B1)
    return student_BM.unbind(1), teacher_BM.unbind(1)
