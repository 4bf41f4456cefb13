"""Following a policy: Euler substeps in sigma on a grid uniform in tau, with no network call.

B batch, C latent channels, N substeps (of the sample with the most). tau is schedule time, sigma the noise level.
Each sample takes its own number of substeps. A policy does the work in `displacements`, in its own best way.
Source: pi-Flow (arXiv 2510.14974).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule

TAU_SLACK = 1e-6  # rounding of float32 times: less than 1e-4 of a substep


@dataclass(frozen=True, kw_only=True)
class SubstepGrid:
    """The substeps of a batch of rollouts. Float64: a substep is a small difference of noise levels near 1."""

    sigma_NB: Tensor
    """Noise level at the start of each substep."""
    step_NB: Tensor
    """Change of sigma in each substep (negative); 0 after a sample's last."""
    sigma_start_B: Tensor
    sigma_end_B: Tensor
    delta_B: Tensor
    """Sum of the steps: sigma_end - sigma_start."""
    order_B: Tensor | None
    """Samples by falling number of substeps, so that the active ones come first; None where the order stays."""
    active: list[int]
    """Number of samples that are still on their way, for each substep."""
    at_source: bool
    """The start is known to be the policy's own source state."""


class Policy(Protocol):
    """What rollouts need of a policy."""

    dtype: torch.dtype
    x_src: Tensor
    sigma_src_B: Tensor

    def displacements(self, states: list[Tensor], grids: list[SubstepGrid]) -> list[Tensor]: ...


def rollout(
    policy: Policy,
    x_BCHW: Tensor,
    tau_start_B: Tensor | float,
    tau_end_B: Tensor | float,
    schedule: FlowSchedule,
    total_substeps: int = 128,
) -> tuple[Tensor, Tensor]:
    """Follow the policy from x at tau_start down to tau_end. Returns (x_end_BCHW, sigma_end_B).

    x_BCHW: (B, C, H, W) or (B, C, F, H, W), at noise level schedule.warp(tau_start). tau_*: (B,) or one float.
    A sample takes max(1, round(length * total_substeps)) substeps (half to even); one of length zero stays where it is.
    tau never falls below 0. Differentiable in the policy and in x. Float32, or float64 where the policy is.
    Raises ValueError where tau_end > tau_start. One host synchronisation, for the substep counts.
    """
    grid = substep_grid(policy, x_BCHW, tau_start_B, tau_end_B, schedule, total_substeps)
    if not grid.active:
        return x_BCHW.to(policy.dtype, copy=True), grid.sigma_end_B.to(policy.dtype)
    return x_BCHW.to(policy.dtype) + policy.displacements([x_BCHW], [grid])[0], grid.sigma_end_B.to(policy.dtype)


def windowed_velocity(
    policy: Policy,
    x_BCHW: Tensor,
    tau_start_B: Tensor | float,
    tau_end_B: Tensor | float,
    schedule: FlowSchedule,
    total_substeps: int = 128,
) -> Tensor:
    """Mean velocity of the policy's rollout from tau_start to tau_end: (x_end - x) / (sigma_end - sigma_start).

    Where the interval is shorter than two substeps: the local velocity at x. Gradients flow into the policy (and x).
    """
    return windowed_velocities(policy, [x_BCHW], [(tau_start_B, tau_end_B)], schedule, total_substeps)[0]


def windowed_velocities(
    policy: Policy,
    states: list[Tensor],
    spans: list[tuple[Tensor | float, Tensor | float]],
    schedule: FlowSchedule,
    total_substeps: int = 128,
) -> list[Tensor]:
    """windowed_velocity of several states of one policy, each with its (tau_start_B, tau_end_B), in one backward."""
    grids = [
        substep_grid(policy, x_BCHW, start_B, end_B, schedule, total_substeps, unit_single_steps=True)
        for x_BCHW, (start_B, end_B) in zip(states, spans, strict=True)
    ]
    moved = policy.displacements(states, grids)
    return [
        x_moved / grid.delta_B.to(policy.dtype).reshape((-1,) + (1,) * (x_moved.dim() - 1))
        for x_moved, grid in zip(moved, grids, strict=True)
    ]


def substep_grid(
    policy: Policy,
    x_BCHW: Tensor,
    tau_start_B: Tensor | float,
    tau_end_B: Tensor | float,
    schedule: FlowSchedule,
    total_substeps: int,
    unit_single_steps: bool = False,
) -> SubstepGrid:
    """Plan the rollouts of a batch; the only place that waits for the device.

    unit_single_steps: an interval of one substep, or of length zero, becomes one Euler step with a sigma change of 1,
    whose displacement is the local velocity itself, with no division by a small number.
    """
    if total_substeps < 1:
        raise ValueError(f"total_substeps={total_substeps}: a rollout needs at least one. 128 is the published number.")
    start_B, end_B = (per_sample(tau, x_BCHW) for tau in (tau_start_B, tau_end_B))
    # The published count: rounded in the times' own dtype, half to even.
    length_B = start_B - end_B
    count_B = torch.round(length_B * total_substeps).clamp(min=1)
    start_B, end_B, length_B = start_B.double(), torch.minimum(end_B, start_B).double(), length_B.double()
    if not unit_single_steps:
        count_B = count_B * (length_B > 0)
    order_B, counts, bad, at_source = _read_counts(policy, x_BCHW, start_B, length_B, count_B, schedule)
    if bad:
        raise ValueError(
            f"cannot roll out from tau_start={start_B.tolist()} over lengths of {length_B.tolist()}: time "
            f"runs from noise (1) to the image (0). Check that tau_start <= 1 and tau_end <= tau_start."
        )
    node_N1 = torch.arange(max(counts, default=0) + 1, dtype=torch.float64, device=x_BCHW.device).unsqueeze(1)
    share_NB = (node_N1 / count_B.clamp(min=1)).clamp(max=1)
    tau_NB = (start_B - (start_B - end_B) * share_NB).clamp(min=0)
    sigma_NB = schedule.warp(tau_NB)
    step_NB = sigma_NB.diff(dim=0)
    if unit_single_steps:
        step_NB = torch.where(count_B == 1, torch.zeros_like(step_NB), step_NB)
        step_NB[0] = torch.where(count_B == 1, torch.ones_like(step_NB[0]), step_NB[0])
    return SubstepGrid(
        sigma_NB=sigma_NB[:-1],
        step_NB=step_NB,
        sigma_start_B=sigma_NB[0],
        sigma_end_B=sigma_NB[-1],
        delta_B=step_NB.sum(0),
        order_B=order_B if len(set(counts)) > 1 else None,
        active=_active_samples(counts),
        at_source=at_source,
    )


def _active_samples(falling_counts: list[int]) -> list[int]:
    """For each substep, how many samples take it."""
    active, m = [], len(falling_counts)
    for n in range(max(falling_counts, default=0)):
        while falling_counts[m - 1] <= n:
            m -= 1
        active.append(m)
    return active


def _read_counts(
    policy: Policy, x_BCHW: Tensor, start_B: Tensor, length_B: Tensor, count_B: Tensor, schedule: FlowSchedule
) -> tuple[Tensor, list[int], bool, bool]:
    """Order by falling count, the counts in that order, whether the times are wrong, whether the start is the source.

    All host knowledge comes in one transfer.
    """
    sorted_B, order_B = count_B.sort(descending=True, stable=True)
    bad = ~((length_B >= -TAU_SLACK) & (start_B <= 1 + TAU_SLACK)).all()
    if x_BCHW is policy.x_src:
        away = ((schedule.warp(start_B) - policy.sigma_src_B).abs() > TAU_SLACK).any()
    else:
        away = torch.ones_like(bad)
    *counts, bad, away = torch.cat([sorted_B.double(), torch.stack([bad, away]).double()]).tolist()
    return order_B, [] if bad else [int(count) for count in counts], bool(bad), not away


def per_sample(time: Tensor | float, x_BCHW: Tensor) -> Tensor:
    """Times or noise levels as (B,) on x's device, in float32 at least. time: a float, or a tensor of 1 or B."""
    if not isinstance(time, Tensor):
        return x_BCHW.new_full((len(x_BCHW),), time, dtype=torch.float64)  # no copy from the host, so no waiting
    time_B = time.to(x_BCHW.device, torch.promote_types(time.dtype, torch.float32)).flatten()
    if len(time_B) not in (1, len(x_BCHW)):
        raise ValueError(f"times of shape {tuple(time.shape)} for {len(x_BCHW)} samples: pass (B,) or a float.")
    return time_B.expand(len(x_BCHW))
