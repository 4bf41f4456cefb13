"""A data law whose flow is known: a mixture of isotropic Gaussians per pixel, and the GM policy that fits it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import F64, GMArrays, per_sample


@dataclass
class MixtureLaw:
    """Clean pixels of C channels: weights_J, centres_JC, one standard deviation."""

    weights: Tensor
    centres: Tensor
    std: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, C)"""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.centres.shape[1], generator=generator, dtype=F64)
        return self.centres[which] + self.std * noise

    def posterior(self, x_BCHW: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log-weights_BJ1HW, means_BJCHW and variance_B of x_0 given the noised pixel (conjugate Gaussians)."""
        x, sigma = x_BCHW[:, None], per_sample(sigma_B, x_BCHW[:, None])
        centres = self.centres.to(x.dtype)[None, :, :, None, None]
        evidence_variance = ((1 - sigma) * self.std) ** 2 + sigma**2
        misfit = ((x - (1 - sigma) * centres) ** 2).sum(2, keepdim=True)
        logweights = self.weights.to(x.dtype).log()[None, :, None, None, None] - misfit / (2 * evidence_variance)
        gain = (1 - sigma) * self.std**2 / evidence_variance
        means = centres + gain * (x - (1 - sigma) * centres)
        variance = (self.std * sigma) ** 2 / evidence_variance
        return logweights.log_softmax(1), means, variance.flatten()

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        """Of the true flow: (x - E[x_0 | x])/sigma."""
        logweights, means, _ = self.posterior(x_BCHW, sigma_B)
        return (x_BCHW - (logweights.exp() * means).sum(1)) / per_sample(sigma_B, x_BCHW)

    def network(self, x_BCHW: Tensor, sigma_B: Tensor) -> GMArrays:
        """What a perfect student puts out: the posterior at the source, in u-space."""
        logweights, means, variance_B = self.posterior(x_BCHW, sigma_B)
        u_means = (x_BCHW[:, None] - means) / per_sample(sigma_B, means)
        logstds = (variance_B.sqrt() / sigma_B).log().view(-1, 1, 1, 1, 1)
        return GMArrays(u_means, logstds, logweights, x_BCHW, sigma_B)


def three_blobs() -> MixtureLaw:
    centres = torch.tensor([[-1.5, 0.3], [0.4, 1.2], [1.1, -0.9]], dtype=F64)
    return MixtureLaw(torch.tensor([0.5, 0.2, 0.3], dtype=F64), centres, 0.25)
