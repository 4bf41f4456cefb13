"""The GMFlow policy: a Gaussian mixture over the clean latent, for each latent pixel.

B batch, K components, C channels, H W latent size (a frame axis may stand before them), P all pixels of a sample.
sigma is the noise level, 1 is noise. Source: GMFlow (arXiv 2504.05304), pi-Flow (arXiv 2510.14974).

With m_k = x_s - s mu_k and v = s^2 exp(2 logstd), the mixture sum_k A_k N(m_k, v I) is what x_0 may be, seen from the
source (x_s, s). Moving the observation to (x, t) reweights and shifts the components; the velocity is that of the
mean x_0. In a form centred on the straight line through the source, exact at t = s and t = 0, with rho = exp(2 logstd):

    eta_k = mu_k - mu_ref       eps_ref = x_s + (1-s) mu_ref      y = x - x_s - (t-s) mu_ref
    z = (s-t)(s+t-2st)          D = t^2 + rho z
    w = softmax_k( log A_k - [ eta_k . ( t(s-t) eps_ref + s(1-t) y ) + z |eta_k|^2/2 ] / D )
    u = mu_ref + { t (y + s sum_k w_k eta_k) - rho [ s(s-t) eps_ref + (s^2 (1-t) + t (1-s)^2) y ] } / D

This holds for any mu_ref: it is a choice of origin, sum_k A_k mu_k at construction, and no gradient has to flow through
it. Dropout and temperature keep it, and with it everything derived from it.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies.coefficients import (
    MixtureDisplacement,
    Walk,
    channel_displacement,
    combination,
    gram_matrix,
    products,
    substep_table,
)
from piflow_dist.policies.rollout import SubstepGrid, per_sample, rollout

MIN_TEMPERATURE = 1e-6  # as published: log-weights are divided by it
SIGMA_SLACK = 1e-6  # schedule.warp(1) may round to just above 1


class _Products:
    """Inner products of the components' directions, formed on first use: values only, shared by derived policies."""

    def __init__(self, eta_BKCP: Tensor, eps_ref_BCP: Tensor):
        self._eta_BKCP, self._eps_ref_BCP = eta_BKCP.detach(), eps_ref_BCP.detach()
        self._gram_BKKP: Tensor | None = None
        self._e_BKP: Tensor | None = None

    @torch.no_grad()
    def get(self) -> tuple[Tensor, Tensor]:
        """(eta_k . eta_j (B, K, K, P), eta_k . eps_ref (B, K, P))."""
        if self._gram_BKKP is None:
            self._gram_BKKP = gram_matrix(self._eta_BKCP)
            self._e_BKP = products(self._eta_BKCP, self._eps_ref_BCP)
        return self._gram_BKKP, self._e_BKP


@dataclass(frozen=True, kw_only=True)
class _Mixture:
    """The policy's numbers, flattened over pixels, in the dtype they are computed in."""

    mu_ref_BCP: Tensor
    eta_BKCP: Tensor
    logweights_BKP: Tensor
    logstd_B: Tensor
    x_src_BCP: Tensor
    eps_ref_BCP: Tensor
    products: _Products


class GMFlowPolicy:
    """A velocity field for every (x, sigma <= sigma_src), from one network output.

    means_BKCHW: u-space component means, (B, K, C, H, W) or (B, K, C, F, H, W).
    logstds_B1111: one u-space log standard deviation per sample.
    logweights_BK1HW: log A_k per pixel, normalised or not; -inf is a dropped component.
    x_src_BCHW, sigma_src_B: the state and noise level the network saw; sigma_src in (0, 1], (B,) or a float.
    Computes in float32, or in float64 where the means or x_src are float64.
    Raises ValueError for shapes that do not fit, sigma_src outside (0, 1], and a pixel without any component.
    """

    has_temperature = True

    def __init__(
        self,
        means_BKCHW: Tensor,
        logstds_B1111: Tensor,
        logweights_BK1HW: Tensor,
        x_src_BCHW: Tensor,
        sigma_src_B: Tensor | float,
    ):
        _check_shapes(means_BKCHW, logstds_B1111, logweights_BK1HW, x_src_BCHW)
        self.dtype = torch.promote_types(torch.promote_types(means_BKCHW.dtype, x_src_BCHW.dtype), torch.float32)
        self.x_src = x_src_BCHW
        self.sigma_src_B = per_sample(sigma_src_B, x_src_BCHW).double()  # near it, small differences decide
        logweights_BKP = logweights_BK1HW.to(self.dtype).flatten(2)
        _check_values(logweights_BKP, self.sigma_src_B)
        means_BKCP = means_BKCHW.to(self.dtype).flatten(3).contiguous()
        x_src_BCP = x_src_BCHW.to(self.dtype).flatten(2)
        with torch.no_grad():
            mu_ref_BCP = combination(logweights_BKP.softmax(1), means_BKCP)
        eta_BKCP = means_BKCP - mu_ref_BCP.unsqueeze(1)
        eps_ref_BCP = x_src_BCP + self._factor(1 - self.sigma_src_B) * mu_ref_BCP
        self._mixture = _Mixture(
            mu_ref_BCP=mu_ref_BCP,
            eta_BKCP=eta_BKCP,
            logweights_BKP=logweights_BKP,
            logstd_B=logstds_B1111.double().flatten(),
            x_src_BCP=x_src_BCP,
            eps_ref_BCP=eps_ref_BCP,
            products=_Products(eta_BKCP, eps_ref_BCP),
        )

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor | float) -> Tensor:
        """u = dx/dsigma at (x, sigma), shaped as x. sigma_B: (B,) or a float, in [0, sigma_src]. Differentiable.

        Evaluated in float64: the logits of a sharp mixture (D near 0) reach 1e5, beyond float32's digits.
        """
        mix, s, t = self._mixture, _column(self.sigma_src_B), _column(per_sample(sigma_B, x_BCHW).double())
        rho = _column((2 * mix.logstd_B).exp())
        z = (s - t) * (s + t - 2 * s * t)
        D = t * t + rho * z
        mu_ref_BCP, eps_ref_BCP, eta_BKCP = mix.mu_ref_BCP.double(), mix.eps_ref_BCP.double(), mix.eta_BKCP.double()
        y_BCP = x_BCHW.flatten(2).double() - mix.x_src_BCP.double() - (t - s) * mu_ref_BCP
        pull_BCP = t * (s - t) * eps_ref_BCP + s * (1 - t) * y_BCP
        pulled_BKP = (eta_BKCP * pull_BCP.unsqueeze(1)).sum(2) + z / 2 * eta_BKCP.square().sum(2)
        weights_BKP = (mix.logweights_BKP.double() - pulled_BKP / D).softmax(1)
        eta_BCP = (weights_BKP.unsqueeze(2) * eta_BKCP).sum(1)
        back_BCP = s * (s - t) * eps_ref_BCP + (s * s * (1 - t) + t * (1 - s) ** 2) * y_BCP
        u_BCP = mu_ref_BCP + (t * (y_BCP + s * eta_BCP) - rho * back_BCP) / D
        return u_BCP.to(self.dtype).view(x_BCHW.shape)

    def displacements(self, states: list[Tensor], grids: list[SubstepGrid]) -> list[Tensor]:
        """x_end - x after the Euler substeps of each grid, from each state; see policies/coefficients.py.

        Differentiable once. The backward of several rollouts costs little more than that of one.
        """
        mix, s = self._mixture, self.sigma_src_B
        rho = (2 * mix.logstd_B).exp()
        moved, factors, starts_y = [], [], []
        for x_BCHW, grid in zip(states, grids, strict=True):
            table, last_A, last_B = substep_table(s, rho, grid.sigma_NB, grid.step_NB)
            moved_BCP = self._factor(grid.delta_B) * mix.mu_ref_BCP + self._factor(last_B) * mix.eps_ref_BCP
            y_BCP = None
            if not grid.at_source:
                away_BCP = x_BCHW.to(self.dtype).flatten(2) - mix.x_src_BCP  # first: exact where x is near x_src
                y_BCP = away_BCP - self._factor(grid.sigma_start_B - s) * mix.mu_ref_BCP
                moved_BCP = moved_BCP + self._factor(last_A - 1) * y_BCP
            moved.append(moved_BCP)
            factors.append(torch.stack(table).to(self.dtype))
            starts_y.append(y_BCP)
        inputs = (mix.eta_BKCP, mix.logweights_BKP, mix.eps_ref_BCP)
        walks = [Walk(grid.order_B, grid.active) for grid in grids]
        if mix.eta_BKCP.shape[1] > 2 * mix.eta_BKCP.shape[2]:
            mixtures = [channel_displacement(*inputs, *rest) for rest in zip(factors, starts_y, walks, strict=True)]
        else:
            mixtures = MixtureDisplacement.apply(
                *inputs, *mix.products.get(), walks, torch.is_grad_enabled(), *factors, *starts_y
            )
        return [(a + b).view(x.shape) for a, b, x in zip(moved, mixtures, states, strict=True)]

    def rollout(
        self,
        x_BCHW: Tensor,
        tau_start_B: Tensor | float,
        tau_end_B: Tensor | float,
        schedule: FlowSchedule,
        total_substeps: int = 128,
    ) -> tuple[Tensor, Tensor]:
        """policies.rollout of this policy."""
        return rollout(self, x_BCHW, tau_start_B, tau_end_B, schedule, total_substeps)

    def detach(self) -> "GMFlowPolicy":
        """The same policy without gradients."""
        mix = self._mixture
        return self._with(
            eta_BKCP=mix.eta_BKCP.detach(),
            logweights_BKP=mix.logweights_BKP.detach(),
            logstd_B=mix.logstd_B.detach(),
            x_src_BCP=mix.x_src_BCP.detach(),
            eps_ref_BCP=mix.eps_ref_BCP.detach(),
        )

    def with_temperature(self, temperature: float) -> "GMFlowPolicy":
        """Sharper below 1: A_k -> A_k^(1/T) renormalised, v -> T v. T is at least 1e-6. Raises ValueError below 0."""
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature} of a GM policy is a number from 0; 1 leaves it as it is.")
        if temperature == 1:
            return self
        T = max(float(temperature), MIN_TEMPERATURE)
        return self._with(
            logweights_BKP=(self._mixture.logweights_BKP / T).log_softmax(1),
            logstd_B=self._mixture.logstd_B + math.log(T) / 2,
        )

    def with_dropout(self, p: float, generator: torch.Generator | None = None) -> "GMFlowPolicy":
        """Drop each component of each sample with probability p, for all its pixels.

        A sample that would have a pixel without components loses none. Meant for the detached policy of training.
        The draw is torch.rand(B, K) on the generator's device.
        """
        if not 0 <= p < 1:
            raise ValueError(f"component dropout p={p} must be at least 0 and below 1. Published: 0.1 for Qwen-Image.")
        if p == 0:
            return self
        logweights_BKP = self._mixture.logweights_BKP
        device = logweights_BKP.device if generator is None else generator.device
        draw_BK = torch.rand(logweights_BKP.shape[:2], generator=generator, device=device)
        drop_BK1 = (draw_BK < p).to(logweights_BKP.device).unsqueeze(2)
        survives_BP = ((logweights_BKP > -math.inf) & ~drop_BK1).any(1)
        drop_BK1 = drop_BK1 & survives_BP.all(1)[:, None, None]
        return self._with(logweights_BKP=logweights_BKP.masked_fill(drop_BK1, -math.inf))

    def _factor(self, value_B: Tensor) -> Tensor:
        return _column(value_B).to(self.dtype)

    def _with(self, **changes: Tensor) -> "GMFlowPolicy":
        policy = object.__new__(GMFlowPolicy)
        policy.dtype, policy.x_src, policy.sigma_src_B = self.dtype, self.x_src, self.sigma_src_B
        policy._mixture = replace(self._mixture, **changes)
        return policy


def _column(value_B: Tensor) -> Tensor:
    return value_B[:, None, None]


def _check_shapes(means: Tensor, logstds: Tensor, logweights: Tensor, x: Tensor) -> None:
    if x.dim() not in (4, 5) or means.dim() != x.dim() + 1 or means.shape[:1] + means.shape[2:] != x.shape:
        raise ValueError(
            f"means of shape {tuple(means.shape)} do not fit x_src of shape {tuple(x.shape)}: expected "
            f"(B, K, C, H, W) and (B, C, H, W), or both with a frame axis before H."
        )
    expected = (*means.shape[:2], 1, *means.shape[3:])
    if logweights.shape != expected:
        raise ValueError(
            f"logweights of shape {tuple(logweights.shape)}: expected {expected}, one per component and "
            f"pixel, for means of shape {tuple(means.shape)}."
        )
    if logstds.numel() != len(x) or logstds.shape[0] != len(x):
        raise ValueError(f"logstds of shape {tuple(logstds.shape)}: expected one per sample, ({len(x)}, 1, 1, 1, 1).")


def _check_values(logweights_BKP: Tensor, sigma_src_B: Tensor) -> None:
    empty = (logweights_BKP.detach().amax(1) == -math.inf).any()
    outside = ~((sigma_src_B > 0) & (sigma_src_B <= 1 + SIGMA_SLACK)).all()
    empty, outside = torch.stack([empty, outside]).tolist()  # waits for the network once, as the rollout does anyway
    if empty:
        raise ValueError(
            "a pixel has all its log-weights at -inf: an empty mixture. Keep at least one component per "
            "pixel, as policy.with_dropout does."
        )
    if outside:
        raise ValueError(f"sigma_src={sigma_src_B.tolist()} is outside (0, 1]: a policy starts from a noisy state.")
