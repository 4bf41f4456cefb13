"""Schedule time and noise level.

tau: uniform schedule time; sigma: noise level after the shift. Both in [0, 1], 1 is noise, and
sigma = warp(tau) = shift * tau / (1 + (shift - 1) * tau).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class FlowSchedule:
    """Maps schedule time to noise level. shift 1 leaves it as it is; 3.2 is Qwen-Image's."""

    shift: float = 3.2

    def __post_init__(self):
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(
                f"shift={self.shift} gives no noise schedule: it must be a positive number. "
                f"Set shift to 1 for no shift, or to 3.2 for Qwen-Image."
            )

    @classmethod
    def dynamic(
        cls,
        num_image_tokens: int,
        base_tokens: int = 256,
        base_log_shift: float = 0.5,
        max_tokens: int = 4096,
        max_log_shift: float = 1.15,
    ) -> "FlowSchedule":
        """The schedule of models whose log shift is linear in the number of image tokens (FLUX, Qwen-Image's own)."""
        if num_image_tokens < 1 or max_tokens <= base_tokens:
            raise ValueError(
                f"{num_image_tokens} image tokens, base_tokens={base_tokens}, max_tokens={max_tokens}: "
                f"there must be at least one token and max_tokens > base_tokens. Check the latent size."
            )
        slope = (max_log_shift - base_log_shift) / (max_tokens - base_tokens)
        return cls(shift=math.exp(base_log_shift + slope * (num_image_tokens - base_tokens)))

    def warp(self, tau: Time) -> Time:
        """Noise level at a schedule time (a float, or a tensor of any shape, whose dtype is kept)."""
        return self.shift * tau / (1 + (self.shift - 1) * tau)

    def unwarp(self, sigma: Time) -> Time:
        """Schedule time at a noise level: the inverse of warp."""
        return sigma / (self.shift + (1 - self.shift) * sigma)

    def segments(self, nfe: int, final_step_size_scale: float = 0.5) -> Tensor:
        """Boundaries in tau of the nfe segments of a trajectory: (nfe + 1,) float32, from 1 down to 0.

        All segments have one length but the last, which is scaled by final_step_size_scale (Qwen-Image: 0.5).
        """
        if nfe < 1:
            raise ValueError(f"nfe={nfe}: a trajectory needs at least one network evaluation. Set nfe to 1 or more.")
        if not final_step_size_scale > 0:
            raise ValueError(
                f"final_step_size_scale={final_step_size_scale} leaves the last segment without length. "
                f"Set it above 0; 1 makes all segments equal."
            )
        step = 1 / (nfe - 1 + final_step_size_scale)
        return torch.tensor([1 - i * step for i in range(nfe)] + [0.0], dtype=torch.float64).float()
