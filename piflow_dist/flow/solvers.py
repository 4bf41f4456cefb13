"""Samplers: Euler steps of a velocity network (the teacher), and policy steps with a flow-map SDE (the student).

Source of the policy sampler: pi-Flow (arXiv 2510.14974).
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule

Progress = Callable[[int, int], object]


class SampledPolicy(Protocol):
    """What sampling asks of a policy; GMFlowPolicy and DXPolicy have it."""

    has_temperature: bool

    def with_temperature(self, temperature: float) -> "SampledPolicy": ...

    def rollout(
        self, x_BCHW: Tensor, tau_start_B: Tensor, tau_end_B: Tensor, schedule: FlowSchedule, total_substeps: int
    ) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def euler_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_BCHW: Tensor,
    schedule: FlowSchedule,
    steps: int,
    progress: Progress | None = None,
) -> Tensor:
    """Integrate velocity(x, sigma_B) from noise to x_0: Euler in sigma, on a grid uniform in tau.

    x_BCHW: noise, (B, C, H, W) or (B, C, F, H, W). progress(done, steps) is called after every step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: sampling needs at least one step. Set steps to 1 or more.")
    x_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
    sigmas = [schedule.warp(1 - i / steps) for i in range(steps + 1)]
    for i in range(steps):
        u_BCHW = velocity(x_BCHW, x_BCHW.new_full((len(x_BCHW),), sigmas[i]))
        x_BCHW = x_BCHW + (sigmas[i + 1] - sigmas[i]) * u_BCHW.to(x_BCHW.dtype)
        if progress is not None:
            progress(i + 1, steps)
    return x_BCHW


@torch.no_grad()
def policy_sample(
    predict_policy: Callable[..., SampledPolicy],
    x_BCHW: Tensor,
    schedule: FlowSchedule,
    nfe: int,
    *,
    final_step_size_scale: float = 0.5,
    trained_nfe: int | None = None,
    total_substeps: int = 128,
    temperature: float | str = 1.0,
    h: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    with_end: bool = False,
) -> Tensor:
    """Sample x_0 from noise with nfe network evaluations, each followed by a policy rollout.

    predict_policy(x_BCHW, sigma_B, tau_B) -> policy: the network.
    temperature: at every step but the last; "auto" is 0.1 (nfe - 1), at most 1, for policies that have a temperature
    (GM). A DX policy has none: "auto" leaves it alone, a number other than 1 is a ValueError.
    h: noise of the flow-map SDE; 0 is the ODE, inf draws all noise afresh at each step.
    with_end: the network is told where its step ends: predict_policy(x_BCHW, sigma_B, tau_B, sigma_dst_B).
    generators: one per sample, so that an image does not depend on its batch; None draws from torch's own generator.
    Raises ValueError for nfe below trained_nfe: segments would be longer than any the student has seen.
    """
    if trained_nfe is not None and nfe < trained_nfe:
        raise ValueError(
            f"nfe={nfe} is below the {trained_nfe} evaluations this student was trained for: its policies "
            f"do not reach that far. Set nfe to {trained_nfe} or more."
        )
    if generators is not None and len(generators) != len(x_BCHW):
        raise ValueError(f"{len(generators)} generators for {len(x_BCHW)} samples: pass one per sample, or None.")
    if not h >= 0:
        raise ValueError(f"h={h}: the noise of the flow-map SDE is 0 (none) or more. Set h to 0 for the ODE.")
    number = _temperature(temperature, nfe)
    x_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))

    def times(value: float) -> Tensor:
        return x_BCHW.new_full((len(x_BCHW),), value)

    taus = schedule.segments(nfe, final_step_size_scale).tolist()
    for i in range(nfe):
        sigma_src, sigma_to = schedule.warp(taus[i]), schedule.warp(taus[i + 1])
        kept, sigma_dst = flow_map_step(sigma_src, sigma_to, h)
        end = (times(sigma_dst),) if with_end else ()
        policy = predict_policy(x_BCHW, times(sigma_src), times(taus[i]), *end)
        if i < nfe - 1 and (policy.has_temperature or temperature != "auto"):
            policy = policy.with_temperature(number)
        x_BCHW, _ = policy.rollout(x_BCHW, times(taus[i]), times(schedule.unwarp(sigma_dst)), schedule, total_substeps)
        if kept < 1 and sigma_to > 0:
            noise_BCHW = _noise_like(x_BCHW, generators)
            x_BCHW = (1 - sigma_to + sigma_to * kept) * x_BCHW + sigma_to * math.sqrt(1 - kept * kept) * noise_BCHW
    return x_BCHW


def flow_map_step(sigma_src: float, sigma_to: float, h: float) -> tuple[float, float]:
    """m, the share of the old noise that is kept, and sigma_dst, the level to roll out to before new noise is added.

    m = (sigma_to (1 - sigma_src) / (sigma_src (1 - sigma_to)))^(h^2), 1 for h = 0 and 0 for h = inf;
    sigma_dst = sigma_to m / (1 - sigma_to + sigma_to m).
    """
    if h == 0:
        return 1.0, sigma_to
    ratio = sigma_to * max(1 - sigma_src, 0.0) / (sigma_src * (1 - sigma_to))  # warp(1) may round to above 1
    m = 0.0 if math.isinf(h) else ratio ** (h * h)
    return m, sigma_to * m / (1 - sigma_to + sigma_to * m)


def _temperature(temperature: float | str, nfe: int) -> float:
    if temperature == "auto":
        return min(max(0.1 * (nfe - 1), 0.0), 1.0)
    if isinstance(temperature, str):
        raise ValueError(f'temperature={temperature!r} is neither a number nor "auto". 1 is the policy as it is.')
    return temperature


def _noise_like(x_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    if generators is None:
        return torch.randn_like(x_BCHW)
    shape, dtype = x_BCHW.shape[1:], x_BCHW.dtype
    return torch.stack(
        [
            torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(x_BCHW.device)
            for generator in generators
        ]
    )
