"""The DX policy: the clean latent as a function of time, given at N nodes, or as a polynomial.

B batch, N nodes, C channels, H W latent size (a frame axis may stand before them), P all pixels of a sample, S
substeps. tau is schedule time, sigma the noise level, 1 is noise. Source: pi-Flow (arXiv 2510.14974).

The network outputs (B, N, C, H, W) in u-space; c_i = x_s - s out_i, and u = (x - x_0(tau)) / max(sigma, 1e-4), with
grid: x_0(tau) linear between nodes; node i at tau_dst + i/(N-1) (tau_src - tau_dst); constant beyond both ends.
polynomial: x_0(tau) = sum_i c_i (tau_src - tau)^i. As published, every c_i holds x_s.
Both are sum_i h_i(tau) c_i, with numbers h that depend on time alone; so a whole rollout is a combination of x, x_s and
the outputs with one number each per sample, and costs as much as one substep.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies.rollout import SubstepGrid, per_sample, rollout

MIN_SIGMA = 1e-4  # as published: u is 0/0 at sigma = 0
Mode = Literal["grid", "polynomial"]


class DXPolicy:
    """A velocity field for every (x, sigma <= sigma_src), from one network output.

    out_BNCHW: u-space values, (B, N, C, H, W) or (B, N, C, F, H, W). x_src_BCHW, sigma_src_B: what the network saw;
    sigma_src (B,) or a float. segment_size (in tau) and shift place the nodes; they belong to the trained policy and
    stay fixed when it is sampled with another number of steps.
    Computes in float32, or in float64 where out or x_src are. Raises ValueError for shapes that do not fit.
    """

    has_temperature = False

    def __init__(
        self,
        out_BNCHW: Tensor,
        x_src_BCHW: Tensor,
        sigma_src_B: Tensor | float,
        segment_size: float = 1 / 3.5,
        shift: float = 3.2,
        mode: Mode = "grid",
    ):
        shape = tuple(x_src_BCHW.shape)
        if x_src_BCHW.dim() not in (4, 5) or (*out_BNCHW.shape[:1], *out_BNCHW.shape[2:]) != shape:
            raise ValueError(
                f"out of shape {tuple(out_BNCHW.shape)} does not fit x_src of shape {shape}: expected "
                f"(B, N, C, H, W) and (B, C, H, W), or both with a frame axis before H."
            )
        if mode not in get_args(Mode):
            raise ValueError(f"policy.mode={mode!r} is not known. Set it to one of {get_args(Mode)}.")
        if not segment_size > 0:
            raise ValueError(
                f"segment_size={segment_size} leaves the policy no time. Set policy.segment_size to "
                f"1/(nfe - 1 + final_step_size_scale), 1/3.5 for the published 4 steps."
            )
        self.dtype = torch.promote_types(torch.promote_types(out_BNCHW.dtype, x_src_BCHW.dtype), torch.float32)
        self.x_src = x_src_BCHW
        self.sigma_src_B = per_sample(sigma_src_B, x_src_BCHW).double()
        self.segment_size, self.schedule, self.mode = segment_size, FlowSchedule(shift), mode
        self._out_BNCP = out_BNCHW.to(self.dtype).flatten(3)
        self._x_src_BCP = x_src_BCHW.to(self.dtype).flatten(2)

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor | float) -> Tensor:
        """u = dx/dsigma at (x, sigma), shaped as x. sigma_B: (B,) or a float, in [0, sigma_src]. Differentiable."""
        sigma_B = per_sample(sigma_B, x_BCHW).double()
        scale_B = 1 / sigma_B.clamp(min=MIN_SIGMA)
        return self._combine(x_BCHW, scale_B, -scale_B.unsqueeze(1) * self._node_factors(sigma_B))

    def displacements(self, states: list[Tensor], grids: list[SubstepGrid]) -> list[Tensor]:
        """x_end - x after the Euler substeps of each grid, from each state. Differentiable."""
        return [self._displacement(x_BCHW, grid) for x_BCHW, grid in zip(states, grids, strict=True)]

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

    def detach(self) -> "DXPolicy":
        """The same policy without gradients."""
        policy = object.__new__(DXPolicy)
        policy.__dict__.update(self.__dict__, _out_BNCP=self._out_BNCP.detach(), _x_src_BCP=self._x_src_BCP.detach())
        return policy

    def with_temperature(self, temperature: float) -> "DXPolicy":
        """A DX policy has no mixture to sharpen: only temperature 1 is possible."""
        if temperature != 1:
            raise ValueError(f"temperature={temperature}, but a DX policy has no temperature. Set temperature to 1.")
        return self

    def with_dropout(self, p: float, generator: torch.Generator | None = None) -> "DXPolicy":
        """A DX policy has no components to drop: only p = 0 is possible."""
        if p != 0:
            raise ValueError(f"component dropout p={p}, but a DX policy has no components. Set it to 0.")
        return self

    def _displacement(self, x_BCHW: Tensor, grid: SubstepGrid) -> Tensor:
        growth_SB = grid.step_NB / grid.sigma_NB.clamp(min=MIN_SIGMA)
        # The factor by which a change made in a substep reaches the end: the product over the substeps after it.
        last_B = torch.ones_like(self.sigma_src_B)
        from_here_SB = (1 + growth_SB).flip(0).cumprod(0).flip(0)
        reach_SB = torch.cat([from_here_SB[1:], last_B[None]])[: len(growth_SB)]
        first_B = from_here_SB[0] if len(growth_SB) else last_B
        factors_BN = -((growth_SB * reach_SB).unsqueeze(-1) * self._node_factors(grid.sigma_NB)).sum(0)
        return self._combine(x_BCHW, first_B - 1, factors_BN)

    def _node_factors(self, sigma: Tensor) -> Tensor:
        """h_i (..., B, N) with x_0 = sum_i h_i c_i, at noise levels (..., B), float64."""
        tau, tau_src_B = self.schedule.unwarp(sigma), self.schedule.unwarp(self.sigma_src_B)
        nodes = self._out_BNCP.shape[1]
        index_N = torch.arange(nodes, dtype=tau.dtype, device=tau.device)
        if self.mode == "polynomial":
            return (tau_src_B - tau).unsqueeze(-1) ** index_N
        tau_dst_B = (tau_src_B - self.segment_size).clamp(min=0)
        place = (tau - tau_dst_B) / (tau_src_B - tau_dst_B).clamp(min=MIN_SIGMA) * (nodes - 1)
        place = place.clamp(0, nodes - 1).unsqueeze(-1)
        return (1 - (place - index_N).abs()).clamp(min=0)

    def _combine(self, x_BCHW: Tensor, own_B: Tensor, factors_BN: Tensor) -> Tensor:
        """own x + sum_i f_i c_i, centred: own (x - x_s) + (own + sum_i f_i) x_s - s sum_i f_i out_i."""

        def column(value_B: Tensor) -> Tensor:
            return value_B.to(self.dtype)[:, None, None]

        total_BCP = column(own_B) * (x_BCHW.to(self.dtype).flatten(2) - self._x_src_BCP)
        total_BCP = torch.addcmul(total_BCP, self._x_src_BCP, column(own_B + factors_BN.sum(1)))
        out_factors_BN = -self.sigma_src_B.unsqueeze(1) * factors_BN
        for i, out_BCP in enumerate(self._out_BNCP.unbind(1)):
            total_BCP = torch.addcmul(total_BCP, out_BCP, column(out_factors_BN[:, i]))
        return total_BCP.view(x_BCHW.shape)
