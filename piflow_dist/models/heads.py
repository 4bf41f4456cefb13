"""Output heads over the transformer's tokens: a velocity (teacher) or the parameters of a policy (student).

B batch, C latent channels, H W latent size, P patch (2), K mixture components, N grid nodes, T = HW/P^2 tokens, D width.
"""

import math

import torch
from torch import Tensor, nn

from piflow_dist.config import PolicyConfig
from piflow_dist.policies import DXPolicy, GMFlowPolicy, MeanPolicy

PATCH = 2


def pack(x_BCHW: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,T,C*P*P): a token holds one 2 x 2 patch, channel first, as in diffusers' Qwen-Image pipeline."""
    B, C, H, W = x_BCHW.shape
    if H % PATCH or W % PATCH:
        raise ValueError(f"A latent of {H} x {W} does not split into {PATCH} x {PATCH} patches. Use an even size.")
    x = x_BCHW.reshape(B, C, H // PATCH, PATCH, W // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (H // PATCH) * (W // PATCH), C * PATCH * PATCH)


def unpack(tokens_BTE: Tensor, size: tuple[int, int], groups: int, channels_last: bool = False) -> Tensor:
    """(B,T,groups*C*P*P) -> (B,groups,C,H,W) for a latent of `size` = (H, W). channels_last: from (B,T,P*P*groups*C)."""
    B, (H, W) = tokens_BTE.shape[0], size
    if channels_last:
        x = tokens_BTE.reshape(B, H // PATCH, W // PATCH, PATCH, PATCH, groups, -1)
        return x.permute(0, 5, 6, 1, 3, 2, 4).reshape(B, groups, -1, H, W)
    x = tokens_BTE.reshape(B, H // PATCH, W // PATCH, groups, -1, PATCH, PATCH)
    return x.permute(0, 3, 4, 1, 5, 2, 6).reshape(B, groups, -1, H, W)


def repeat_groups(output: Tensor, groups: int, channels_last: bool) -> Tensor:
    """Rows of a projection for one group of channels -> for `groups` of them, all alike."""
    if not channels_last:
        return output.repeat(groups, *[1] * (output.dim() - 1))
    pixels = output.unflatten(0, (PATCH * PATCH, 1, -1))
    return pixels.expand(-1, groups, *pixels.shape[2:]).flatten(0, 2)


class VelocityHead(nn.Module):
    """The teacher's output projection: u = eps - x_0, (B,C,H,W)."""

    takes_span = False

    def __init__(self, width: int, channels: int, channels_last: bool = False):
        super().__init__()
        self.channels_last = channels_last
        self.proj_out = nn.Linear(width, channels * PATCH * PATCH)

    def forward(self, tokens_BTD: Tensor, temb_BD: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(self.proj_out(tokens_BTD), size, 1, self.channels_last)[:, 0]


class GMHead(nn.Module):
    """Means, one log standard deviation per sample and log-weights of a GMFlow policy."""

    takes_span = False

    def __init__(self, width: int, channels: int, config: PolicyConfig, channels_last: bool = False):
        super().__init__()
        self.components, self.channels_last = config.num_components, channels_last
        self.proj_out_means = nn.Linear(width, self.components * channels * PATCH * PATCH)
        self.proj_out_logweights = nn.Linear(width, self.components * PATCH * PATCH)
        self.proj_out_logstds = nn.Sequential(
            nn.SiLU(), nn.Linear(width, config.logstd_inner_dim), nn.SiLU(), nn.Linear(config.logstd_inner_dim, 1)
        )

    @torch.no_grad()
    def init_from_teacher(self, head: VelocityHead, generator: torch.Generator) -> None:
        """Every component starts as the teacher's velocity, told apart by bias noise of 0.05; equal weights.

        One number for each component and channel, as published: alike in all pixels of a patch, no checkerboard.
        """
        self.proj_out_means.weight.copy_(repeat_groups(head.proj_out.weight, self.components, self.channels_last))
        bias = repeat_groups(head.proj_out.bias, self.components, self.channels_last)
        noise = 0.05 * torch.randn(bias.numel() // PATCH**2, generator=generator)
        each = noise.repeat(PATCH**2) if self.channels_last else noise.repeat_interleave(PATCH**2)
        self.proj_out_means.bias.copy_(bias + each)
        for parameter in (*self.proj_out_logweights.parameters(), self.proj_out_logstds[3].weight):
            parameter.zero_()
        self.proj_out_logstds[3].bias.fill_(math.log(0.05))

    def forward(self, tokens_BTD: Tensor, temb_BD: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Returns means (B,K,C,H,W), logstds (B,1,1,1,1) and normalised logweights (B,K,1,H,W), float32."""
        logits_BK1HW = unpack(self.proj_out_logweights(tokens_BTD), size, self.components, self.channels_last)
        # The published student detaches the embedding: one scalar per image must not steer the whole time embedder.
        logstds_B1 = self.proj_out_logstds(temb_BD.detach())
        return {
            "means": unpack(self.proj_out_means(tokens_BTD), size, self.components, self.channels_last).float(),
            "logstds": logstds_B1.float()[:, :, None, None, None],
            "logweights": logits_BK1HW.float().log_softmax(dim=1),
        }


class DXHead(nn.Module):
    """N velocities of a DX policy, (B,N,C,H,W): x_0 at the nodes of a time grid, or polynomial coefficients."""

    takes_span = False

    def __init__(self, width: int, channels: int, config: PolicyConfig, channels_last: bool = False):
        super().__init__()
        self.nodes, self.channels_last = config.num_nodes, channels_last
        self.proj_out = nn.Linear(width, self.nodes * channels * PATCH * PATCH)

    @torch.no_grad()
    def init_from_teacher(self, head: VelocityHead, generator: torch.Generator) -> None:
        """Every node starts as the teacher's velocity, so that an untrained grid policy is the teacher's Euler step."""
        self.proj_out.weight.copy_(repeat_groups(head.proj_out.weight, self.nodes, self.channels_last))
        self.proj_out.bias.copy_(repeat_groups(head.proj_out.bias, self.nodes, self.channels_last))

    def forward(self, tokens_BTD: Tensor, temb_BD: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"out": unpack(self.proj_out(tokens_BTD), size, self.nodes, self.channels_last).float()}


class MeanHead(VelocityHead):
    """One velocity for a whole segment. Its network is told how long the segment is (takes_span), and starts as the teacher."""

    takes_span = True

    @torch.no_grad()
    def init_from_teacher(self, head: VelocityHead, generator: torch.Generator) -> None:
        self.load_state_dict(head.state_dict())

    def forward(self, tokens_BTD: Tensor, temb_BD: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        mean_BCHW = super().forward(tokens_BTD, temb_BD, size)
        return {"mean": mean_BCHW.to(torch.promote_types(mean_BCHW.dtype, torch.float32))}


def build_policy_head(
    width: int, channels: int, config: PolicyConfig, channels_last: bool = False
) -> GMHead | DXHead | MeanHead:
    match config.type:
        case "gmflow":
            return GMHead(width, channels, config, channels_last)
        case "dx":
            return DXHead(width, channels, config, channels_last)
        case _:
            return MeanHead(width, channels, channels_last)


def make_policy(
    outputs: dict[str, Tensor],
    x_src_BCHW: Tensor,
    sigma_src_B: Tensor,
    config: PolicyConfig,
    segment_size: float,
    shift: float,
) -> GMFlowPolicy | DXPolicy | MeanPolicy:
    """The policy that a head's outputs describe at its source. segment_size and shift matter to DX only."""
    if config.type == "gmflow":
        return GMFlowPolicy(outputs["means"], outputs["logstds"], outputs["logweights"], x_src_BCHW, sigma_src_B)
    if config.type == "mean":
        return MeanPolicy(outputs["mean"], x_src_BCHW, sigma_src_B)
    return DXPolicy(outputs["out"], x_src_BCHW, sigma_src_B, segment_size=segment_size, shift=shift, mode=config.mode)
