"""The mean policy: one velocity for a whole segment, what the baselines' students predict (distill/baselines.py).

B batch, C channels, H W latent size. sigma is the noise level, 1 is noise. A rollout to any noise level is one Euler step, and
exact; but the network has predicted the mean for one end of the segment, and only there does x_end mean anything.
"""

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies.rollout import SubstepGrid, per_sample, rollout


class MeanPolicy:
    """u(x, sigma) = mean, everywhere. mean_BCHW, x_src_BCHW: (B, C, H, W); sigma_src (B,) or a float.

    Computes in float32, or in float64 where mean or x_src are. Raises ValueError for shapes that do not fit.
    """

    has_temperature = False

    def __init__(self, mean_BCHW: Tensor, x_src_BCHW: Tensor, sigma_src_B: Tensor | float):
        if mean_BCHW.shape != x_src_BCHW.shape:
            raise ValueError(
                f"mean of shape {tuple(mean_BCHW.shape)} does not fit x_src of shape {tuple(x_src_BCHW.shape)}: "
                "expected one velocity for every element."
            )
        self.dtype = torch.promote_types(torch.promote_types(mean_BCHW.dtype, x_src_BCHW.dtype), torch.float32)
        self.x_src, self.mean = x_src_BCHW, mean_BCHW.to(self.dtype)
        self.sigma_src_B = per_sample(sigma_src_B, x_src_BCHW).double()

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor | float) -> Tensor:
        return self.mean

    def displacements(self, states: list[Tensor], grids: list[SubstepGrid]) -> list[Tensor]:
        """x_end - x after the substeps of each grid, whose sizes add up. Differentiable."""
        return [grid.delta_B.to(self.dtype).reshape((-1,) + (1,) * (self.mean.dim() - 1)) * self.mean for grid in grids]

    def rollout(
        self,
        x_BCHW: Tensor,
        tau_start_B: Tensor | float,
        tau_end_B: Tensor | float,
        schedule: FlowSchedule,
        total_substeps: int = 128,
    ) -> tuple[Tensor, Tensor]:
        """policies.rollout of this policy."""
        return rollout(self, x_BCHW, tau_start_B, tau_end_B, schedule, total_substeps)

    def detach(self) -> "MeanPolicy":
        """The same policy without gradients."""
        return MeanPolicy(self.mean.detach(), self.x_src.detach(), self.sigma_src_B)

    def with_temperature(self, temperature: float) -> "MeanPolicy":
        """One velocity has no mixture to sharpen: only temperature 1 is possible."""
        if temperature != 1:
            raise ValueError(f"temperature={temperature}, but a mean policy has no temperature. Set temperature to 1.")
        return self
