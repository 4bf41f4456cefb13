"""Exponential moving average of the trained weights, fp32, sharded like them."""

import torch
from torch import Tensor


def karras_beta(step: int, gamma: float) -> float:
    """Decay (1 - 1/t)^(gamma + 1) at step t >= 1: the average forgets its start, whatever its length.

    Source: Karras et al., arXiv 2312.02696, power-function profiles.
    """
    if step < 1:
        raise ValueError(f"step={step}: the average is defined from step 1 on.")
    return (1 - 1 / step) ** (gamma + 1)


class Ema:
    """Average of a list of fp32 tensors. Up to start_step it is a copy of them."""

    def __init__(self, weights: list[Tensor], gamma: float, start_step: int):
        self.gamma, self.start_step = gamma, start_step
        self.averages = [weight.detach().clone() for weight in weights]

    def decay(self, step: int) -> float:
        """Decay after optimiser step `step` (counted from 1)."""
        return karras_beta(step, self.gamma) if step > self.start_step else 0.0

    @torch.no_grad()
    def update(self, weights: list[Tensor], step: int) -> None:
        beta = self.decay(step)
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, 1 - beta)
