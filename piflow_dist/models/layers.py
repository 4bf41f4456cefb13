"""Layers that several transformers share, with the names and the arithmetic of diffusers' layers.

B batch, S tokens, D width, N heads, E head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_dist.models.lora import apply_linear

EPS = 1e-6
TIME_CHANNELS = 256


def embedder(channels: int, width: int) -> nn.Module:
    """Two linear layers, `linear_1` and `linear_2`, for two_layers."""
    module = nn.Module()
    module.linear_1 = nn.Linear(channels, width)
    module.linear_2 = nn.Linear(width, width)
    return module


def two_layers(module: nn.Module, x: Tensor, adapted: bool) -> Tensor:
    return apply_linear(module.linear_2, F.silu(apply_linear(module.linear_1, x, adapted)), adapted)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(value_B: Tensor) -> Tensor:
    """Cosines, then sines, of 128 frequencies from 1 down to 1/10,000: (B,) float32 or float64 -> (B, 256)."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, device=value_B.device) * (-math.log(10_000) / half))
    angles = value_B[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x_BSNE: Tensor, rotary_SE: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels, in float32 at least: one pass as complex numbers, six times faster than cos and sin."""
    pairs = torch.view_as_complex(at_least_float32(x_BSNE).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary_SE[:, None]).flatten(-2).type_as(x_BSNE)


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear; the names are diffusers'."""

    def __init__(self, width: int):
        super().__init__()
        up = nn.Module()
        up.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        return apply_linear(
            self.net[2], F.gelu(apply_linear(self.net[0].proj, x, adapted), approximate="tanh"), adapted
        )


def modulate(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float = EPS) -> Tensor:
    return torch.addcmul(shift_B1D, F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=eps), 1 + scale_B1D)


class FinalNorm(nn.Module):
    """Layer norm modulated by the time embedding. shift_first: the order of the linear layer's halves, else scale first."""

    def __init__(self, width: int, shift_first: bool = False):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.shift_first = shift_first

    def forward(self, x_BTD: Tensor, temb_BD: Tensor) -> Tensor:
        first_B1D, second_B1D = self.linear(F.silu(temb_BD))[:, None].chunk(2, dim=-1)
        shift_B1D, scale_B1D = (first_B1D, second_B1D) if self.shift_first else (second_B1D, first_B1D)
        return modulate(x_BTD, shift_B1D, scale_B1D)
