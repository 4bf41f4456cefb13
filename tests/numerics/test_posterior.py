"""A GM policy fitted exactly to a mixture law carries the true flow: one network call is worth the whole trajectory."""

import pytest
import torch

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import rollout

from .cases import F64, normal, per_sample, relative_error_B, rng
from .mixture_law import three_blobs

LAW = three_blobs()


def noised(sigma_B: torch.Tensor, side: int, seed: int) -> torch.Tensor:
    """Samples of the law, noised to sigma_B: (B, 2, side, side)."""
    batch = len(sigma_B)
    x0 = LAW.draw(batch * side * side, rng(seed)).view(batch, side, side, 2).permute(0, 3, 1, 2)
    sigma = per_sample(sigma_B, x0)
    return (1 - sigma) * x0 + sigma * normal(*x0.shape, seed=seed + 1)


@pytest.mark.parametrize("sigma_src", [1.0, 0.9, 0.4])
def test_velocity_is_the_true_flow_at_every_later_time(sigma_src):
    """Given the state at the source, and given none: the posterior at (x, t) is the same, whatever x_src was."""
    parts = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.05, 0.01], dtype=F64)
    sigma_B = sigma_src * parts
    source_B = torch.full_like(sigma_B, sigma_src)
    policy = LAW.network(noised(source_B, 4, seed=1), source_B).package()
    x = noised(sigma_B, 4, seed=3)
    assert relative_error_B(policy.velocity(x, sigma_B), LAW.velocity(x, sigma_B)).max() < 1e-10


@pytest.mark.parametrize("sigma", [0.8, 0.5, 0.3])
def test_x0_posterior_mean_against_samples_of_the_law(sigma):
    """No closed form on this side: 400,000 clean pixels, weighted by how well each explains x."""
    x0_PC = LAW.draw(400_000, rng(5))
    source_B, sigma_B = torch.tensor([0.95], dtype=F64), torch.tensor([sigma], dtype=F64)
    x = noised(sigma_B, 2, seed=6)
    u = LAW.network(noised(source_B, 2, seed=8), source_B).package().velocity(x, sigma_B)
    got = (x - sigma * u)[0].flatten(1).T
    for x_C, mean_C in zip(x[0].flatten(1).T, got, strict=True):
        log_likelihood = -((x_C - (1 - sigma) * x0_PC) ** 2).sum(1) / (2 * sigma**2)
        weight = log_likelihood.softmax(0)[:, None]
        want_C = (weight * x0_PC).sum(0)
        spread_C = (weight**2 * (x0_PC - want_C) ** 2).sum(0).sqrt()
        assert ((mean_C - want_C).abs() < 4 * spread_C).all()


def test_one_policy_from_noise_draws_the_law():
    """K = 3 components fitted at sigma = 1, 20,000 pixels of noise, one rollout: the law's moments and shares."""
    side = 142
    x = normal(1, 2, side, side, seed=9)
    one = torch.ones(1, dtype=F64)
    schedule = FlowSchedule(shift=3.2)
    end, _ = rollout(LAW.network(x, one).package(), x, one, torch.zeros(1, dtype=F64), schedule, total_substeps=256)
    points = end[0].flatten(1).T
    mean = (LAW.weights[:, None] * LAW.centres).sum(0)
    offsets = LAW.centres - mean
    covariance = (LAW.weights[:, None, None] * offsets[:, :, None] * offsets[:, None]).sum(0) + LAW.std**2 * torch.eye(
        2
    )
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(points.T.cov(), covariance, rtol=0, atol=0.04)
    nearest = torch.cdist(points, LAW.centres).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(points)
    torch.testing.assert_close(shares.double(), LAW.weights, rtol=0, atol=0.015)
    inside = points[nearest == 1] - LAW.centres[1]
    assert inside.std(0).mean().item() == pytest.approx(LAW.std, rel=0.06)


def test_rollout_of_the_policy_is_the_true_ode():
    """Same substeps, velocities from the law at every substep instead of from one network call."""
    x = normal(1, 2, 4, 4, seed=10)
    one = torch.ones(1, dtype=F64)
    schedule = FlowSchedule(shift=1.0)
    end, _ = rollout(
        LAW.network(x, one).package(), x, one, torch.tensor([0.25], dtype=F64), schedule, total_substeps=64
    )
    want = x
    for i in range(48):
        want = want - LAW.velocity(want, torch.tensor([1 - i / 64], dtype=F64)) / 64
    assert relative_error_B(end, want).max() < 1e-10
