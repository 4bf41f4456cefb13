"""Random but plausible inputs, in the package's batched layout and as one reference object per sample."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piflow_dist.policies import DXPolicy, GMFlowPolicy

from .exact import gm_velocity
from .reference import DX, GaussianMixture, rollout, unwarp

F64 = torch.float64


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (like.ndim - 1))


@dataclass
class GMArrays:
    """means_BKCS, logstds_B1..1, logweights_BK1S, x_src_BCS, sigma_src_B."""

    means: Tensor
    logstds: Tensor
    logweights: Tensor
    x_src: Tensor
    sigma_src: Tensor

    def to(self, dtype: torch.dtype) -> "GMArrays":
        return GMArrays(*[value.to(dtype) for value in vars(self).values()])

    def leaves(self) -> "GMArrays":
        """Fresh copies; the network's three outputs require gradients."""
        copy = GMArrays(*[value.detach().clone() for value in vars(self).values()])
        for value in (copy.means, copy.logstds, copy.logweights):
            value.requires_grad_()
        return copy

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.means, self.logstds, self.logweights

    def package(self) -> GMFlowPolicy:
        return GMFlowPolicy(self.means, self.logstds, self.logweights, self.x_src, self.sigma_src)

    def reference(self) -> list[GaussianMixture]:
        """Float64; keeps the autograd graph to these arrays."""
        return [
            GaussianMixture(
                self.means[b].double(),
                self.logstds[b].double().squeeze(),
                self.logweights[b].double(),
                self.x_src[b].double(),
                self.sigma_src[b].double().item(),
            )
            for b in range(len(self.means))
        ]


def gm_arrays(
    sigma_src: list[float],
    *,
    components: int = 4,
    channels: int = 3,
    space: tuple[int, ...] = (2, 2),
    logstd: float | list[float] | None = None,
    normalised: bool = True,
    seed: int = 0,
) -> GMArrays:
    """x_src lies between a latent and noise of unit variance; the means scatter around its true velocity by 0.6."""
    batch = len(sigma_src)
    sigma_B = torch.tensor(sigma_src, dtype=F64)
    x0, noise = normal(batch, channels, *space, seed=seed), normal(batch, channels, *space, seed=seed + 1000)
    sigma = per_sample(sigma_B, x0)
    scatter = 0.6 * normal(batch, components, channels, *space, seed=seed + 2000)
    logweights = 1.5 * normal(batch, components, 1, *space, seed=seed + 3000)
    if logstd is None:
        logstd_B = -1 + normal(batch, seed=seed + 4000) / 2
    else:
        logstd_B = torch.as_tensor(logstd, dtype=F64).expand(batch).clone()
    return GMArrays(
        means=(noise - x0)[:, None] + scatter,
        logstds=logstd_B.view(-1, *[1] * (x0.ndim)),
        logweights=logweights.log_softmax(1) if normalised else logweights,
        x_src=(1 - sigma) * x0 + sigma * noise,
        sigma_src=sigma_B,
    )


@dataclass
class DXArrays:
    """out_BNCS, x_src_BCS, sigma_src_B and the policy's own constants."""

    out: Tensor
    x_src: Tensor
    sigma_src: Tensor
    segment_size: float
    shift: float
    mode: str

    def to(self, dtype: torch.dtype) -> "DXArrays":
        return replace(self, out=self.out.to(dtype), x_src=self.x_src.to(dtype), sigma_src=self.sigma_src.to(dtype))

    def leaves(self) -> "DXArrays":
        return replace(self, out=self.out.detach().clone().requires_grad_())

    def outputs(self) -> tuple[Tensor]:
        return (self.out,)

    def package(self) -> DXPolicy:
        return DXPolicy(
            self.out, self.x_src, self.sigma_src, segment_size=self.segment_size, shift=self.shift, mode=self.mode
        )

    def reference(self) -> list[DX]:
        return [
            DX(
                self.out[b].double(),
                self.x_src[b].double(),
                self.sigma_src[b].double().item(),
                self.segment_size,
                self.shift,
                self.mode,
            )
            for b in range(len(self.out))
        ]


def dx_arrays(
    sigma_src: list[float],
    *,
    mode: str = "grid",
    nodes: int = 5,
    channels: int = 3,
    space: tuple[int, ...] = (2, 2),
    segment_size: float = 1 / 3.5,
    shift: float = 3.2,
    seed: int = 0,
) -> DXArrays:
    gm = gm_arrays(sigma_src, components=nodes, channels=channels, space=space, seed=seed)
    return DXArrays(gm.means, gm.x_src, gm.sigma_src, segment_size, shift, mode)


def states_towards_components(arrays: GMArrays, sigma_B: Tensor, seed: int = 0) -> Tensor:
    """States at sigma_B on straight lines from the source, each pixel along a draw from one of its components."""
    batch, components, channels, *space = arrays.means.shape
    pick = torch.randint(components, (batch, 1, 1, *space), generator=rng(seed)).expand(batch, 1, channels, *space)
    u = arrays.means.gather(1, pick)[:, 0]
    u = u + per_sample(arrays.logstds.flatten().exp(), u) * normal(*u.shape, seed=seed + 1)
    return arrays.x_src + per_sample(sigma_B - arrays.sigma_src, u) * u


def states_between_components(arrays: GMArrays, sigma_B: Tensor, seed: int = 0) -> Tensor:
    """States at sigma_B on lines half way between two components, where the weights turn most quickly."""
    batch, components, channels, *space = arrays.means.shape
    ends = []
    for offset in (0, 1):
        pick = torch.randint(components, (batch, 1, 1, *space), generator=rng(seed + offset))
        ends.append(arrays.means.gather(1, pick.expand(batch, 1, channels, *space))[:, 0])
    return arrays.x_src + per_sample(sigma_B - arrays.sigma_src, ends[0]) * (ends[0] + ends[1]) / 2


def states_on_path(arrays: GMArrays, sigma_B: Tensor, substeps: int = 24) -> Tensor:
    """States at sigma_B where the policy's own flow leads from the source (reference rollout, shift 1)."""
    ends = []
    for policy, x, s, t in zip(
        arrays.reference(), arrays.x_src, arrays.sigma_src.tolist(), sigma_B.tolist(), strict=True
    ):
        start, end = unwarp(s, 1.0), unwarp(t, 1.0)
        ends.append(rollout(policy.velocity, x.double(), start, end, 1.0, round(substeps / max(start - end, 1e-9))))
    return torch.stack(ends)


def relative_error_B(got: Tensor, want: Tensor) -> Tensor:
    """Per sample: norm of the difference over the norm of what is right."""
    difference = (got.double() - want.double()).flatten(1).norm(dim=1)
    return difference / want.double().flatten(1).norm(dim=1)


def exact_velocity(arrays: GMArrays, x: Tensor, sigma: list[float]) -> Tensor:
    """exact.gm_velocity over all samples and pixels; float64, shaped like x."""
    arrays, want = arrays.to(F64), torch.empty(x.shape, dtype=F64).flatten(2)
    means, logweights = arrays.means.flatten(3), arrays.logweights.flatten(3)
    x_src, x_flat = arrays.x_src.flatten(2), x.flatten(2)
    for b in range(len(x)):
        for p in range(x_flat.shape[2]):
            u_C = gm_velocity(
                means[b, :, :, p].detach(),
                arrays.logstds[b].item(),
                logweights[b, :, 0, p].detach(),
                x_src[b, :, p],
                arrays.sigma_src[b].item(),
                x_flat[b, :, p].detach(),
                sigma[b],
            )
            want[b, :, p] = torch.from_numpy(u_C)
    return want.view(x.shape)
