"""Networks of closed form for the tests of distill/objectives.py: what they are asked and what they answer is known.

B batch, C latent channels, H W latent size, L text tokens, D width.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from piflow_dist.distill.objectives import Batch
from piflow_dist.flow.schedule import FlowSchedule

C, H, W, L, D = 3, 2, 2, 4, 2
SCHEDULE = FlowSchedule(3.2)
EMPTY_TONE = -1.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(value_B: Tensor) -> Tensor:
    return value_B.reshape(-1, 1, 1, 1)


def make_batch(B: int, empty_tokens: int = 2) -> Batch:
    """Prompts of 1 to L tokens that all hold the prompt's tone, 0 to 4; 99 where the mask is off."""
    mask_BL = torch.arange(L) <= torch.arange(B)[:, None] % L
    text_BLD = torch.where(mask_BL[..., None], tones(B)[:, None, None], 99.0).expand(B, L, D)
    places = torch.arange(empty_tokens) - (empty_tokens - 1) / 2  # no two tokens of the empty prompt alike
    empty_LD = (EMPTY_TONE + places)[:, None].expand(empty_tokens, D)
    return Batch(normal(B, C, H, W, seed=1) + 2, text_BLD, mask_BL, empty_LD)


def tones(B: int) -> Tensor:
    return torch.arange(B) % 5 / 1.0


def tone(text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return (text_BLD.mean(2) * mask_BL).sum(1) / mask_BL.sum(1)


class Network:
    """Notes what it is asked and in which order; gradients add up as in the engine."""

    def __init__(self, answer):
        self.answer, self.calls, self.order, self.losses = answer, [], [], []

    def __call__(self, x, sigma, text, mask, guidance=None):
        self.order.append("forward")
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, text=text, mask=mask, guidance=guidance))
        return self.answer(x, sigma, text, mask)

    def backward(self, loss: Tensor) -> None:
        self.order.append("backward")
        self.losses.append(loss.item())
        loss.backward()


def noise_in(x_BCHW: Tensor, x0_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """eps of x = (1 - sigma) x_0 + sigma eps, in float64."""
    sigma = column(sigma_B).double()
    return (x_BCHW.double() - (1 - sigma) * x0_BCHW.double()) / sigma
