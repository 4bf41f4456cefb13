"""The baselines beside imitation: MeanFlow, and regression of the teacher's end point. Same networks, data, teacher and segments.

Their students predict one velocity for a whole segment, from sigma down to r: the mean of the flow's velocity on the way,

    u(x, r, sigma) = 1/(sigma - r) * integral from r to sigma of v(x_s, s) ds,        x_r = x - (sigma - r) u

so that one Euler step is exact (policies/mean.py). All of it is in the noise level sigma, in which the flow is
dx/dsigma = v; schedule time tau only says where on it times are drawn and segments end.

B batch, C latent channels, H W latent size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from piflow_dist.config import Config, MeanFlowConfig
from piflow_dist.distill.diagnostics import StepMeter
from piflow_dist.distill.objectives import (
    Batch,
    Network,
    TeacherVelocity,
    TrainedNetwork,
    add_noise,
    enter_segment,
    guidance_input,
    randn_like,
)
from piflow_dist.flow.schedule import FlowSchedule


class DifferentiableNetwork(TrainedNetwork, Protocol):
    def derivative(self, inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Tensor:
        """Of the mean velocity along the tangents of the inputs, without gradients."""


def meanflow_step(
    model: DifferentiableNetwork,
    teacher: Network,
    batch: Batch,
    config: Config,
    schedule: FlowSchedule,
    scale: float,
    generator: torch.Generator,
    meter: StepMeter | None = None,
) -> Tensor:
    """MeanFlow (arXiv 2505.13447): u = v - (sigma - r) du/dsigma along the flow, the right side held fixed.

    du/dsigma is the network's derivative along (v, 1, 0) in (x, sigma, r), so along (v, 1, 1) in what it reads: x, sigma and the
    length sigma - r. v: the teacher's guided velocity, or eps - x_0 (distill.meanflow.velocity).
    Returns the detached mean square error; the weighted one, whose backward is taken, is about 1 whatever has been learnt.
    """
    settings = config.distill.meanflow
    noise_BCHW = randn_like(batch.x0_BCHW, generator)
    sigma_B, end_B = meanflow_times(len(noise_BCHW), settings, schedule, generator)
    x_BCHW, span_B = add_noise(batch.x0_BCHW, noise_BCHW, sigma_B), sigma_B - end_B
    if settings.velocity == "teacher":
        velocity = TeacherVelocity(teacher, batch, config.distill.guidance, config.model.guidance_embeds)
        v_BCHW = velocity(x_BCHW, sigma_B)
    else:
        v_BCHW = noise_BCHW - batch.x0_BCHW
    guidance_B = guidance_input(config.model.guidance_embeds, config.distill.guidance.scale, sigma_B)
    inputs = (x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL, guidance_B, span_B)
    one_B = torch.ones_like(sigma_B)
    along_BCHW = model.derivative(inputs, (v_BCHW, one_B, None, None, None, one_B))
    target_BCHW = v_BCHW - span_B[:, None, None, None] * along_BCHW
    mean_BCHW = model(*inputs)["mean"]
    if meter is not None:
        meter.add_velocities(mean_BCHW, target_BCHW, sigma_B)
    square_BCHW = (mean_BCHW - target_BCHW).square()
    model.backward(adaptive_loss(square_BCHW, settings) * scale)
    return square_BCHW.detach().mean()


def meanflow_times(
    count: int, settings: MeanFlowConfig, schedule: FlowSchedule, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise levels (sigma_B, r_B) with r <= sigma, equal for a random share of the images.

    Logit-normal in tau. (Of sigma it is then logit-normal too, its mean larger by log shift.)
    """
    device = generator.device
    drawn_2B = torch.randn(2, count, generator=generator, device=device) * settings.time_std + settings.time_mean
    tau_2B = drawn_2B.sigmoid().sort(dim=0)[0]
    instant_B = torch.rand(count, generator=generator, device=device) < settings.instant_share
    sigma_B = schedule.warp(tau_2B[1])
    return sigma_B, torch.where(instant_B, sigma_B, schedule.warp(tau_2B[0]))


def adaptive_loss(square_BCHW: Tensor, settings: MeanFlowConfig) -> Tensor:
    """Mean over images of |error|^2 / (|error|^2 + c)^p, the divisor held fixed; |.|^2 sums over an image's elements."""
    square_B = square_BCHW.flatten(1).sum(1)
    return (square_B * (square_B.detach() + settings.weight_constant) ** -settings.weight_power).mean()


def shortcut_step(
    model: TrainedNetwork,
    teacher: Network,
    batch: Batch,
    config: Config,
    schedule: FlowSchedule,
    scale: float,
    generator: torch.Generator,
    meter: StepMeter | None = None,
) -> Tensor:
    """Regress the mean velocity to where the teacher's own Euler steps through a segment end (knowledge distillation; of all
    segments in one student, as progressive distillation's last round). Segments are drawn and entered as imitation's are.

    Returns the detached loss, loss_scale/2 times the mean square error.
    """
    x_src_BCHW, tau_src_B, length_B, _ = enter_segment(batch, config, schedule, generator)
    velocity = TeacherVelocity(teacher, batch, config.distill.guidance, config.model.guidance_embeds)
    x_end_BCHW = follow_teacher(velocity, x_src_BCHW, tau_src_B, length_B, schedule, config.distill.teacher_substeps)
    sigma_src_B, sigma_end_B = schedule.warp(tau_src_B), schedule.warp((tau_src_B - length_B).clamp(min=0))
    span_B = sigma_src_B - sigma_end_B
    target_BCHW = (x_src_BCHW - x_end_BCHW) / span_B[:, None, None, None]
    guidance_B = guidance_input(config.model.guidance_embeds, config.distill.guidance.scale, sigma_src_B)
    mean_BCHW = model(x_src_BCHW, sigma_src_B, batch.text_BLD, batch.mask_BL, guidance_B, span_B)["mean"]
    if meter is not None:
        meter.add_velocities(mean_BCHW, target_BCHW, sigma_src_B)
    loss = F.mse_loss(mean_BCHW, target_BCHW) * (config.distill.loss_scale / 2)
    model.backward(loss * scale)
    return loss.detach()


def follow_teacher(
    velocity: TeacherVelocity,
    x_BCHW: Tensor,
    tau_src_B: Tensor,
    length_B: Tensor,
    schedule: FlowSchedule,
    substeps: int,
) -> Tensor:
    """Euler in sigma on a grid uniform in tau, each image through its own segment. Returns x at the segment's end."""
    sigma_B = schedule.warp(tau_src_B)
    for i in range(1, substeps + 1):
        next_B = schedule.warp((tau_src_B - length_B * (i / substeps)).clamp(min=0))
        x_BCHW = x_BCHW + (next_B - sigma_B)[:, None, None, None] * velocity(x_BCHW, sigma_B)
        sigma_B = next_B
    return x_BCHW
