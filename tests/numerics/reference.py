"""Plain float64 versions of the formulas of the method, one sample at a time, to compare piflow_dist with.

They share no code with the package and are written from the mathematics, not from it: Bayes' rule in natural parameters
for the Gaussian-mixture policy, a Python loop over substeps for rollouts, one over states for the imitation segment.

Tensors hold one sample and carry no batch axis. Axes: C channels, then any spatial axes ("S": H W, or F H W); K
components; N nodes.
`tau` is schedule time, `sigma` (s at the source, t elsewhere) the noise level; Python floats here. 1 is noise.
Sources: pi-Flow (arXiv 2510.14974), GMFlow (arXiv 2504.05304).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (x_CS, sigma) -> u_CS


# -- schedule --
def warp(tau: float, shift: float) -> float:
    return shift * tau / (1 + (shift - 1) * tau)


def unwarp(sigma: float, shift: float) -> float:
    """Odds: sigma/(1 - sigma) = shift * tau/(1 - tau), solved for tau."""
    if sigma == 1.0:
        return 1.0
    odds = sigma / (1 - sigma) / shift
    return odds / (1 + odds)


# -- policies --
@dataclass
class GaussianMixture:
    """GMFlow policy of one sample: means_KCS in u-space, logstd (scalar), logweights_K1S, x_src_CS, noise level s."""

    means: Tensor
    logstd: Tensor
    logweights: Tensor
    x_src: Tensor
    s: float

    def detach(self) -> "GaussianMixture":
        return GaussianMixture(self.means.detach(), self.logstd.detach(), self.logweights.detach(), self.x_src, self.s)

    def at_temperature(self, temperature: float) -> "GaussianMixture":
        """A_k -> A_k^(1/T) renormalised, variance -> T variance."""
        logweights = torch.log_softmax(self.logweights / temperature, dim=0)
        return GaussianMixture(self.means, self.logstd + math.log(temperature) / 2, logweights, self.x_src, self.s)

    def keep(self, components: list[int]) -> "GaussianMixture":
        """Without the other components (what log-weights of -inf mean)."""
        means, logweights = self.means[components], self.logweights[components]
        return GaussianMixture(means, self.logstd, logweights, self.x_src, self.s)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """(x - E[x_0 | x at t])/t. Loses digits as t -> 0: exact.py is for that.

        Natural parameters of a Gaussian in x_0: precision and shift = precision * mean, with log integral
        shift^2/(2 precision) - log(precision)/2 per channel. Seeing x at noise level t adds ((1-t)/t)^2 and
        (1-t) x/t^2; what the source x_src at s had added is taken away again.
        """
        s, clean_KCS = self.s, self.x_src - self.s * self.means
        variance = (s * self.logstd.exp()) ** 2
        prior_precision, prior_shift_KCS = 1 / variance, clean_KCS / variance
        precision = prior_precision + ((1 - t) / t) ** 2 - ((1 - s) / s) ** 2
        shift_KCS = prior_shift_KCS + (1 - t) * x / t**2 - (1 - s) * self.x_src / s**2
        channels = x.shape[0]

        def log_integral(precision: Tensor, shift_KCS: Tensor) -> Tensor:
            return ((shift_KCS**2 / (2 * precision)).sum(1, keepdim=True)) - channels / 2 * torch.log(precision)

        logits_K1S = (
            self.logweights + log_integral(precision, shift_KCS) - log_integral(prior_precision, prior_shift_KCS)
        )
        x0_CS = (logits_K1S.softmax(0) * shift_KCS / precision).sum(0)
        return (x - x0_CS) / t


@dataclass
class DX:
    """DX policy of one sample: out_NCS in u-space, x_src_CS, noise level s; grid or polynomial in tau."""

    out: Tensor
    x_src: Tensor
    s: float
    segment_size: float
    shift: float
    mode: str

    def detach(self) -> "DX":
        return DX(self.out.detach(), self.x_src, self.s, self.segment_size, self.shift, self.mode)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        clean = [self.x_src - self.s * out for out in self.out]
        tau, tau_src = unwarp(t, self.shift), unwarp(self.s, self.shift)
        if self.mode == "polynomial":
            x0 = torch.zeros_like(x)
            for i, coefficient in enumerate(clean):
                x0 = x0 + coefficient * (tau_src - tau) ** i
        else:
            tau_dst = max(tau_src - self.segment_size, 0.0)
            nodes = [tau_dst + i / (len(clean) - 1) * (tau_src - tau_dst) for i in range(len(clean))]
            x0 = clean[0] if tau <= nodes[0] else clean[-1]
            for i in range(len(nodes) - 1):
                if nodes[i] < tau <= nodes[i + 1]:
                    part = (tau - nodes[i]) / (nodes[i + 1] - nodes[i])
                    x0 = (1 - part) * clean[i] + part * clean[i + 1]
        return (x - x0) / max(t, 1e-4)


Policy = GaussianMixture | DX


# -- following a velocity --
def substeps_of(length: float, total_substeps: int) -> int:
    """Half to even, as Python rounds; at least one."""
    return max(1, round(length * total_substeps))


def rollout(
    velocity: Velocity, x: Tensor, tau_start: float, tau_end: float, shift: float, total_substeps: int
) -> Tensor:
    """Euler in sigma on a grid uniform in tau."""
    length = tau_start - tau_end
    if length == 0:
        return x
    count = substeps_of(length, total_substeps)
    for i in range(count):
        here, there = tau_start - length * i / count, tau_start - length * (i + 1) / count
        sigma = warp(here, shift)
        x = x + (warp(there, shift) - sigma) * velocity(x, sigma)
    return x


def mean_velocity(
    velocity: Velocity, x: Tensor, tau_start: float, tau_end: float, shift: float, total_substeps: int
) -> Tensor:
    """Of a rollout; the local velocity where that has only one substep."""
    if substeps_of(tau_start - tau_end, total_substeps) < 2:
        return velocity(x, warp(tau_start, shift))
    end = rollout(velocity, x, tau_start, tau_end, shift, total_substeps)
    return (end - x) / (warp(tau_end, shift) - warp(tau_start, shift))


def guided(
    u_cond: Tensor,
    u_uncond: Tensor,
    scale: float,
    x: Tensor,
    sigma: float,
    orthogonal: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Classifier-free guidance; `orthogonal` is the share removed of the update's part along the conditional x_0."""
    if scale <= 1 or not interval[0] <= sigma <= interval[1]:
        return u_cond
    update = (scale - 1) * (u_cond - u_uncond)
    axis = (x - sigma * u_cond).flatten()
    axis = axis / axis.norm()
    return u_cond + update - orthogonal * (update.flatten() @ axis) * axis.view_as(x)


# -- imitation --
@dataclass
class Imitation:
    """Of one sample: M predictions, targets and visited states, and the end of the segment."""

    predictions: list[Tensor]
    targets: list[Tensor]
    taus: list[float]
    x_end: Tensor

    def squared_error(self) -> Tensor:
        errors = [(p - u).square().mean() for p, u in zip(self.predictions, self.targets, strict=True)]
        return torch.stack(errors).mean()


def imitate(
    policy: Policy,
    teacher: Velocity,
    x_src: Tensor,
    tau_src: float,
    segment: float,
    shift: float,
    *,
    window_substeps: int,
    total_substeps: int,
    ratio: float,
    student_uniforms: list[float],
    teacher_cuts: list[float],
    frozen: Policy | None = None,
) -> Imitation:
    """One pi-ID segment. M student_uniforms; M - 1 teacher_cuts in [0, 1] make M teacher intervals.

    The window is counted in the segment's own substeps. The end of the segment is reached from the last state.
    """
    frozen = frozen or policy.detach()
    window = min(window_substeps * segment / substeps_of(segment, total_substeps), segment)
    reach = segment - window
    marks = [0.0, *sorted(student_uniforms)]
    cuts = [0.0, *sorted(teacher_cuts), 1.0]
    x, tau = x_src, tau_src
    result = Imitation([], [], [], x_src)
    for i in range(len(student_uniforms)):
        tau_a = tau - (marks[i + 1] - marks[i]) * (1 - ratio) * reach
        with torch.no_grad():
            x_a = rollout(frozen.velocity, x, tau, tau_a, shift, total_substeps)
            target = teacher(x_a, warp(tau_a, shift))
        tau_b = tau_a - (cuts[i + 1] - cuts[i]) * ratio * reach
        result.predictions.append(mean_velocity(policy.velocity, x_a, tau_a, tau_b - window, shift, total_substeps))
        result.targets.append(target)
        result.taus.append(tau_a)
        x, tau = x_a + (warp(tau_b, shift) - warp(tau_a, shift)) * target, tau_b
    with torch.no_grad():
        result.x_end = rollout(frozen.velocity, x, tau, max(tau_src - segment, 0.0), shift, total_substeps)
    return result


# -- sampling --
def flow_map(sigma_src: float, sigma_to: float, h: float) -> tuple[float, float, float]:
    """(m, sigma_dst, scale of x_dst) of one flow-map SDE step; the noise is scaled by sigma_to sqrt(1 - m^2)."""
    if h == 0:
        m = 1.0
    elif math.isinf(h):
        m = 0.0
    else:
        m = (sigma_to * (1 - sigma_src) / (sigma_src * (1 - sigma_to))) ** (h * h)
    scale = 1 - sigma_to + sigma_to * m
    return m, sigma_to * m / scale, scale


def segment_bounds(nfe: int, last_scale: float) -> list[float]:
    """In exact fractions, then as float32 numbers: that is what the schedule hands out."""
    base = 1 / (nfe - 1 + Fraction(last_scale))
    return torch.tensor([float(1 - i * base) for i in range(nfe)] + [0.0], dtype=torch.float32).tolist()


def sample(
    predict: Callable[[Tensor, float], Policy],
    x: Tensor,
    shift: float,
    nfe: int,
    *,
    last_scale: float,
    total_substeps: int,
    temperature: float,
    h: float,
    noise: Callable[[], Tensor],
) -> Tensor:
    """predict(x, sigma) -> policy of this sample; noise() is asked once a step that adds any, but for the last."""
    bounds = segment_bounds(nfe, last_scale)
    for step in range(nfe):
        sigma_src, sigma_to = warp(bounds[step], shift), warp(bounds[step + 1], shift)
        last = step == nfe - 1
        policy = predict(x, sigma_src)
        if temperature != 1 and not last:
            policy = policy.at_temperature(temperature)
        m, sigma_dst, scale = flow_map(sigma_src, sigma_to, h)
        x = scale * rollout(policy.velocity, x, bounds[step], unwarp(sigma_dst, shift), shift, total_substeps)
        if not last and m < 1:
            x = x + sigma_to * math.sqrt(1 - m * m) * noise()
    return x
