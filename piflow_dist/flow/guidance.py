"""Classifier-free guidance of a velocity field."""

import torch
from torch import Tensor

MIN_MEAN_SQUARE = 1e-6  # of x_0, below which it has no direction to speak of


def needs_uncond(scale: float | Tensor) -> bool:
    """Whether guided_velocity needs the unconditional velocity: guidance acts only above scale 1.

    A tensor on an accelerator is read back here (a synchronisation): decide once, not per step.
    """
    return bool((scale > 1).any()) if isinstance(scale, Tensor) else scale > 1


def guided_velocity(
    u_cond: Tensor,
    u_uncond: Tensor | None,
    scale: float | Tensor,
    *,
    x: Tensor | None = None,
    sigma: float | Tensor | None = None,
    orthogonal: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """u = u_c + (g - 1) (u_c - u_n), as float32 (float64 where the velocities are).

    u_cond, u_uncond, x: (B, C, ...). scale: g, a float or (B,); at 1 and below, no guidance. sigma: noise level, a
    float or (B,). orthogonal: the share (0 to 1) of the guidance along the conditional x_0 = x - sigma u_c that is
    removed, per sample; needs x and sigma. interval: noise levels (both ends included) outside of which the scale is 1;
    needs sigma. u_uncond may be None where needs_uncond(scale) is False.
    """
    dtype = torch.promote_types(u_cond.dtype, torch.float32)
    u_cond = u_cond.to(dtype)
    if u_uncond is None:
        if needs_uncond(scale):
            raise ValueError(
                f"guidance scale {scale} needs the unconditional velocity, but u_uncond is None. "
                f"Evaluate the teacher without a prompt too, or set the guidance scale to 1."
            )
        return u_cond
    per_sample = (-1,) + (1,) * (u_cond.dim() - 1)

    def as_factor(value: float | Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            return u_cond.new_full((1,) * u_cond.dim(), value)
        return value.to(u_cond.device, dtype).reshape(per_sample)

    extra = as_factor(scale).clamp(min=1) - 1
    if tuple(interval) != (0.0, 1.0):
        if sigma is None:
            raise ValueError(f"guidance interval {interval} needs the noise level, but sigma is None. Pass sigma.")
        level = as_factor(sigma)
        extra = extra * ((level >= interval[0]) & (level <= interval[1]))
    guidance = extra * (u_cond - u_uncond.to(dtype))
    if orthogonal:
        if x is None or sigma is None:
            raise ValueError(f"orthogonal={orthogonal} guidance needs the state: pass x and sigma, or orthogonal=0.")
        x_0 = x.to(dtype) - as_factor(sigma) * u_cond
        dims = tuple(range(1, u_cond.dim()))
        mean_square = x_0.square().mean(dims, keepdim=True).clamp(min=MIN_MEAN_SQUARE)
        guidance = guidance - orthogonal * (guidance * x_0).mean(dims, keepdim=True) / mean_square * x_0
    return u_cond + guidance
