"""What a micro-batch contributes to the step: losses whose gradients add up in the trained model's shards.

B batch, C latent channels, H W latent size, L text tokens, D width, M intermediate states.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from piflow_dist.config import Config, GuidanceConfig, ScheduleConfig
from piflow_dist.distill.diagnostics import StepMeter
from piflow_dist.distill.imitation import ImitationOutput, ImitationSettings, imitation_segment
from piflow_dist.flow.guidance import guided_velocity, needs_uncond
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.models.heads import PATCH, make_policy


class Network(Protocol):
    """A velocity network or a student: (x_BCHW, sigma_B, text_BLD, mask_BL, guidance_B, span_B) -> what its head returns."""

    def __call__(self, *inputs: Tensor | None) -> Any: ...


class TrainedNetwork(Network, Protocol):
    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class Batch:
    """Clean latents (B,C,H,W), prompts (B,L,D) with their mask (B,L), and the embedding of the empty prompt (L0,D)."""

    x0_BCHW: Tensor
    text_BLD: Tensor
    mask_BL: Tensor
    empty_LD: Tensor

    def __post_init__(self):
        missing = len(self.empty_LD) - self.text_BLD.shape[1]
        if missing > 0:  # room for the empty prompt in every row
            object.__setattr__(self, "text_BLD", F.pad(self.text_BLD, (0, 0, 0, missing)))
            object.__setattr__(self, "mask_BL", F.pad(self.mask_BL, (0, missing)))

    def without_prompts(self, drop_B: Tensor | None = None) -> "Batch":
        """The batch with the empty prompt where drop_B is true (everywhere by default)."""
        unused = self.text_BLD.shape[1] - len(self.empty_LD)
        text_BLD = F.pad(self.empty_LD, (0, 0, 0, unused)).expand_as(self.text_BLD)
        mask_BL = (torch.arange(self.mask_BL.shape[1], device=self.mask_BL.device) < len(self.empty_LD)).expand_as(
            self.mask_BL
        )
        if drop_B is not None:
            text_BLD = torch.where(drop_B[:, None, None], text_BLD, self.text_BLD)
            mask_BL = torch.where(drop_B[:, None], mask_BL, self.mask_BL)
        return Batch(self.x0_BCHW, text_BLD, mask_BL, self.empty_LD)


class TeacherVelocity:
    """Guided velocity of the frozen teacher; takes any number of states per prompt at once, state-major.

    embedded: the scale is the network's input (a guidance-distilled teacher): one evaluation, with the prompt.
    """

    def __init__(self, teacher: Network, batch: Batch, guidance: GuidanceConfig, embedded: bool = False):
        self.teacher, self.guidance, self.embedded = teacher, guidance, embedded
        self.cond, self.uncond = batch, batch.without_prompts()

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        repeats, guidance = len(x_BCHW) // len(self.cond.mask_BL), self.guidance
        if self.embedded or not needs_uncond(guidance.scale):
            return self._evaluate(x_BCHW, sigma_B, [self.cond] * repeats)
        prompts = [self.cond] * repeats + [self.uncond] * repeats
        u_cond_BCHW, u_uncond_BCHW = self._evaluate(torch.cat([x_BCHW] * 2), torch.cat([sigma_B] * 2), prompts).chunk(2)
        return guided_velocity(
            u_cond_BCHW,
            u_uncond_BCHW,
            guidance.scale,
            x=x_BCHW,
            sigma=sigma_B,
            orthogonal=guidance.orthogonal,
            interval=tuple(guidance.interval),
        )

    def _evaluate(self, x_BCHW: Tensor, sigma_B: Tensor, prompts: list[Batch]) -> Tensor:
        text_BLD = torch.cat([prompt.text_BLD for prompt in prompts])
        mask_BL = torch.cat([prompt.mask_BL for prompt in prompts])
        guidance_B = guidance_input(self.embedded, self.guidance.scale, sigma_B)
        return self.teacher(x_BCHW, sigma_B, text_BLD, mask_BL, guidance_B).float()


def guidance_input(embedded: bool, scale: float, sigma_B: Tensor) -> Tensor | None:
    """The guidance scale for networks that take it as an input."""
    return torch.full_like(sigma_B, scale) if embedded else None


def flow_matching_step(
    model: TrainedNetwork,
    batch: Batch,
    config: Config,
    schedule: FlowSchedule,
    scale: float,
    generator: torch.Generator,
    meter: StepMeter | None = None,
) -> Tensor:
    """|u(x_sigma, sigma, prompt) - (eps - x_0)|^2 at tau ~ U(0, 1], prompts dropped at random; backward of scale * it.

    Returns the detached mean loss (before `scale`).
    """
    B, device = len(batch.x0_BCHW), batch.x0_BCHW.device
    batch = batch.without_prompts(torch.rand(B, generator=generator, device=device) < config.data.caption_dropout)
    noise_BCHW = randn_like(batch.x0_BCHW, generator)
    sigma_B = schedule.warp(1 - torch.rand(B, generator=generator, device=device))
    x_BCHW = add_noise(batch.x0_BCHW, noise_BCHW, sigma_B)
    u_BCHW = model(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL).float()
    loss = F.mse_loss(u_BCHW, noise_BCHW - batch.x0_BCHW)
    if meter is not None:
        meter.add_velocities(u_BCHW, noise_BCHW - batch.x0_BCHW, sigma_B)
    model.backward(loss * scale)
    return loss.detach()


def imitation_data_step(
    model: TrainedNetwork,
    teacher: Network,
    batch: Batch,
    config: Config,
    schedule: FlowSchedule,
    step: int,
    scale: float,
    generator: torch.Generator,
    meter: StepMeter | None = None,
) -> Tensor:
    """pi-ID on data: one segment per image, chosen by tau ~ U(0, 1] and entered from the noised image."""
    source = enter_segment(batch, config, schedule, generator)
    velocity = TeacherVelocity(teacher, batch, config.distill.guidance, config.model.guidance_embeds)
    ratio = teacher_ratio(step, config)
    out = imitate(model, velocity, batch, *source, config, schedule, ratio, generator, meter)
    model.backward(out.loss * scale)
    return out.loss.detach()


def enter_segment(
    batch: Batch, config: Config, schedule: FlowSchedule, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_src_BCHW, tau_src_B, length_B, index_B): the noised images at the starts of the segments that random times fall into."""
    B, device = len(batch.x0_BCHW), batch.x0_BCHW.device
    boundaries = segment_boundaries(config, schedule).to(device)
    tau_B = 1 - torch.rand(B, generator=generator, device=device)
    index_B = (boundaries[None, 1:] >= tau_B[:, None]).sum(dim=1)  # segment i covers (boundary i+1, boundary i]
    tau_src_B = boundaries[index_B]
    noise_BCHW = randn_like(batch.x0_BCHW, generator)
    x_src_BCHW = add_noise(batch.x0_BCHW, noise_BCHW, schedule.warp(tau_src_B))
    return x_src_BCHW, tau_src_B, tau_src_B - boundaries[index_B + 1], index_B


def imitation_datafree_step(
    model: TrainedNetwork,
    teacher: Network,
    batch: Batch,
    config: Config,
    schedule: FlowSchedule,
    step: int,
    scale: float,
    generator: torch.Generator,
    meter: StepMeter | None = None,
) -> Tensor:
    """pi-ID from noise: walk all segments, one backward each, entering the next where the walk through this one ends.

    The walk is the detached policy's, and with scheduled mixing partly the teacher's (imitation_segment). Of the batch's
    images only the shape is used. Returns the detached sum of the segments' losses weighted by length.
    """
    velocity = TeacherVelocity(teacher, batch, config.distill.guidance, config.model.guidance_embeds)
    boundaries = segment_boundaries(config, schedule).to(batch.x0_BCHW.device)
    x_BCHW, losses, ratio = randn_like(batch.x0_BCHW, generator), [], teacher_ratio(step, config)
    for index, (tau, tau_next) in enumerate(zip(boundaries[:-1], boundaries[1:], strict=True)):
        tau_B, length_B = tau.expand(len(x_BCHW)), (tau - tau_next).expand(len(x_BCHW))
        source = (x_BCHW, tau_B, length_B, torch.full_like(tau_B, index, dtype=torch.long))
        out = imitate(model, velocity, batch, *source, config, schedule, ratio, generator, meter)
        loss = out.loss * (tau - tau_next)
        model.backward(loss * scale)
        losses.append(loss.detach())
        x_BCHW = out.x_end
    return torch.stack(losses).sum()


def imitate(
    model: TrainedNetwork,
    velocity: TeacherVelocity,
    batch: Batch,
    x_src_BCHW: Tensor,
    tau_src_B: Tensor,
    length_B: Tensor,
    index_B: Tensor,
    config: Config,
    schedule: FlowSchedule,
    ratio: float,
    generator: torch.Generator,
    meter: StepMeter | None,
) -> ImitationOutput:
    """One network evaluation and the imitation of one segment, number index_B (from 0)."""
    sigma_src_B = schedule.warp(tau_src_B)
    guidance_B = guidance_input(config.model.guidance_embeds, config.distill.guidance.scale, sigma_src_B)
    outputs = model(x_src_BCHW, sigma_src_B, batch.text_BLD, batch.mask_BL, guidance_B)
    policy = make_policy(outputs, x_src_BCHW, sigma_src_B, config.policy, base_segment(config), schedule.shift)
    trajectory_policy = policy.detach()
    if config.policy.type == "gmflow" and config.distill.component_dropout > 0:
        trajectory_policy = trajectory_policy.with_dropout(config.distill.component_dropout, generator)
    out = imitation_segment(
        policy,
        velocity,
        x_src_BCHW,
        tau_src_B,
        length_B,
        schedule,
        imitation_settings(config),
        teacher_ratio=ratio,
        generator=generator,
        rollout_policy=trajectory_policy,
    )
    if meter is not None:
        meter.add_imitation(out, outputs, index_B)
    return out


def build_schedule(config: ScheduleConfig, latent_shape: tuple[int, int, int]) -> FlowSchedule:
    """latent_shape: (C, H, W), which decides a dynamic shift."""
    if not config.dynamic:
        return FlowSchedule(shift=config.shift)
    return FlowSchedule.dynamic(latent_shape[1] * latent_shape[2] // PATCH**2)


def imitation_settings(config: Config) -> ImitationSettings:
    distill = config.distill
    return ImitationSettings(
        num_intermediate_states=distill.num_intermediate_states,
        window_substeps=distill.window_substeps,
        total_substeps=distill.total_substeps,
        loss_scale=distill.loss_scale,
        stack_teacher_states=distill.stack_teacher_states,
    )


def teacher_ratio(step: int, config: Config) -> float:
    """Scheduled mixing: share of a segment that follows the teacher at optimiser step `step`, counted from 0."""
    decay = config.distill.num_decay_iters
    return max(0.0, 1 - step / decay) if decay else 0.0


def segment_boundaries(config: Config, schedule: FlowSchedule) -> Tensor:
    return schedule.segments(config.distill.nfe, config.distill.final_step_size_scale).float()


def base_segment(config: Config) -> float:
    """Length in tau of every segment but the last."""
    return config.distill.base_segment


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma eps."""
    return torch.lerp(x0_BCHW, noise_BCHW, sigma_B[:, None, None, None])


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
