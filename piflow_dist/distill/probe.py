"""How far the policy's end points are from the teacher's trajectory, on images and noise that never change.

From each of the teacher's states at a segment's start the student makes one policy, which is followed to the segment's end and
compared with where the teacher went. Unlike the loss, which asks at states of the student's own, this is comparable over time.

B images, C latent channels, H W latent size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from piflow_dist.config import Config
from piflow_dist.distill.objectives import (
    Batch,
    TeacherVelocity,
    segment_boundaries,
)
from piflow_dist.distill.student import predictor, takes_end
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.parallel.zero import FrozenModel, TiedTeacher, TrainedModel
from piflow_dist.policies import rollout

TEACHER_STEPS = 8
"""Euler steps of the teacher per segment."""


class PolicyProbe:
    """Collective: data-parallel ranks share the images out, tensor-parallel ranks have the same ones."""

    def __init__(
        self,
        config: Config,
        schedule: FlowSchedule,
        model: TrainedModel,
        teacher: FrozenModel | TiedTeacher,
        batch: Batch,
        counts_B: Tensor | None = None,
    ):
        """batch: prompts, and noise in the place of images. counts_B: 0 for images that another rank has (default: none)."""
        self.config, self.schedule, self.model, self.batch = config, schedule, model, batch
        self.velocity = TeacherVelocity(teacher, batch, config.distill.guidance, config.model.guidance_embeds)
        self.counts_B = batch.x0_BCHW.new_ones(len(batch.x0_BCHW)) if counts_B is None else counts_B
        self.taus = segment_boundaries(config, schedule).tolist()
        self.states: list[Tensor] = []
        """Of the teacher at the segments' boundaries; walked at the first measurement, as it is frozen."""

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Distances relative to how far the teacher went in the segment; the training's random numbers stay as they were."""
        device = self.batch.x0_BCHW.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.model.evaluating():
            self.states = self.states or self._teacher_states()
            squares = torch.stack([self._squares(i) for i in range(len(self.taus) - 1)])
        dist.all_reduce(squares)
        found = (squares[:, 0] / squares[:, 1].clamp(min=1e-12)).sqrt().tolist()
        values = {f"probe/segment_{i}": value for i, value in enumerate(found, 1)}
        return values | {"probe/end_point": sum(found) / len(found)}

    def _squares(self, i: int) -> Tensor:
        """(2,): mean squares of distance and of the teacher's way, summed over the images that count."""
        x_BCHW, wanted_BCHW = self.states[i], self.states[i + 1]
        tau_B, end_B = (x_BCHW.new_full((len(x_BCHW),), tau) for tau in self.taus[i : i + 2])
        config, ends = self.config, (self.schedule.warp(end_B),) if takes_end(self.config) else ()
        policy = predictor(self.model, self.batch, config, self.schedule)(
            x_BCHW, self.schedule.warp(tau_B), tau_B, *ends
        )
        end_BCHW, _ = rollout(policy, x_BCHW, tau_B, end_B, self.schedule, config.distill.total_substeps)
        ways = (end_BCHW - wanted_BCHW, wanted_BCHW - x_BCHW)
        return torch.stack(
            [torch.where(self.counts_B > 0, way.double().square().flatten(1).mean(1), 0).sum() for way in ways]
        )

    def _teacher_states(self) -> list[Tensor]:
        x_BCHW = self.batch.x0_BCHW
        states = [x_BCHW]
        for start, end in zip(self.taus[:-1], self.taus[1:], strict=True):
            sigmas = self.schedule.warp(torch.linspace(start, end, TEACHER_STEPS + 1)).tolist()
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                u_BCHW = self.velocity(x_BCHW, x_BCHW.new_full((len(x_BCHW),), sigma))
                x_BCHW = x_BCHW + (following - sigma) * u_BCHW
            states.append(x_BCHW)
        return states
