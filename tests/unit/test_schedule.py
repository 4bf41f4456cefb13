"""Schedule, guidance and samplers: values that can be worked out by hand, and errors."""

import math

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.flow.guidance import guided_velocity, needs_uncond
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import euler_sample, flow_map_step, policy_sample
from piflow_dist.policies import DXPolicy, GMFlowPolicy


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [1.0, 3.2, 0.4])
def test_warp_and_unwarp_are_inverse_and_keep_the_ends(shift):
    schedule, tau = FlowSchedule(shift), torch.linspace(0, 1, 33, dtype=torch.float64)
    sigma = schedule.warp(tau)
    assert_close(schedule.unwarp(sigma), tau)
    assert_close(sigma[[0, -1]], tau[[0, -1]])
    assert (sigma.diff() > 0).all()
    assert isinstance(schedule.warp(0.5), float)
    assert schedule.warp(0.5) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


def test_dynamic_shift_is_exponential_in_the_tokens():
    assert FlowSchedule.dynamic(256).shift == pytest.approx(math.exp(0.5))
    assert FlowSchedule.dynamic(4096).shift == pytest.approx(math.exp(1.15))
    assert FlowSchedule.dynamic(2176).shift == pytest.approx(math.exp(0.825))


def test_segments():
    schedule = FlowSchedule()
    assert_close(schedule.segments(4, 0.5), torch.tensor([7, 5, 3, 1, 0]) / 7)
    assert_close(schedule.segments(2, 1.0), torch.tensor([1.0, 0.5, 0.0]))
    assert_close(schedule.segments(1, 0.5), torch.tensor([1.0, 0.0]))
    assert schedule.segments(4).dtype == torch.float32


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FlowSchedule(0.0),
        lambda: FlowSchedule(math.nan),
        lambda: FlowSchedule().segments(0),
        lambda: FlowSchedule().segments(4, 0.0),
        lambda: FlowSchedule.dynamic(0),
    ],
)
def test_bad_schedules_are_errors(wrong):
    with pytest.raises(ValueError, match="Set|Check"):
        wrong()


def test_guidance_per_sample_and_only_above_one():
    u_c, u_n = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    u = guided_velocity(u_c, u_n, torch.tensor([4.0, 1.0, 0.2]))
    assert_close(u[0], u_c[0] + 3 * (u_c[0] - u_n[0]))
    assert_close(u[1:], u_c[1:])
    assert_close(guided_velocity(u_c, None, 1.0), u_c)
    assert needs_uncond(1.5) and not needs_uncond(1.0) and needs_uncond(torch.tensor([0.5, 2.0]))


def test_guidance_interval_acts_by_noise_level():
    u_c, u_n = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    u = guided_velocity(u_c, u_n, 4.0, sigma=torch.tensor([0.1, 0.5, 0.9]), interval=(0.2, 0.8))
    assert_close(u[[0, 2]], u_c[[0, 2]])
    assert_close(u[1], guided_velocity(u_c, u_n, 4.0)[1])


def test_orthogonal_guidance_leaves_x_0_alone_along_itself():
    u_c, u_n, x = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), noise(2, 3, 4, 4, seed=2)
    sigma = torch.tensor([0.3, 0.9])
    u = guided_velocity(u_c, u_n, 4.0, x=x, sigma=sigma, orthogonal=1.0)
    x_0 = x - sigma.reshape(2, 1, 1, 1) * u_c
    assert_close(((u - u_c) * x_0).flatten(1).sum(1), torch.zeros(2), atol=1e-4, rtol=0)
    half = guided_velocity(u_c, u_n, 4.0, x=x, sigma=sigma, orthogonal=0.5)
    assert_close(half, (u + guided_velocity(u_c, u_n, 4.0)) / 2)


def test_guidance_computes_in_float32_and_names_what_is_missing():
    u = noise(2, 2, 4, 4).bfloat16()
    assert guided_velocity(u, u, 4.0).dtype == torch.float32
    with pytest.raises(ValueError, match="u_uncond"):
        guided_velocity(u, None, 4.0)
    with pytest.raises(ValueError, match="sigma"):
        guided_velocity(u, u, 4.0, interval=(0.0, 0.5))
    with pytest.raises(ValueError, match="orthogonal"):
        guided_velocity(u, u, 4.0, orthogonal=1.0)


def test_euler_is_exact_on_a_straight_line_and_reports_progress():
    x_0, eps, seen = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), []
    got = euler_sample(lambda x, sigma: eps - x_0, eps, FlowSchedule(), 5, progress=lambda *done: seen.append(done))
    assert_close(got, x_0)
    assert seen == [(n, 5) for n in range(1, 6)]
    with pytest.raises(ValueError, match="steps=0"):
        euler_sample(lambda x, sigma: x, eps, FlowSchedule(), 0)


def one_component(x, sigma, velocity):
    """A GM policy of one very narrow component: its path is a straight line."""
    means = velocity.unsqueeze(1)
    return GMFlowPolicy(means, torch.full((len(x), 1, 1, 1, 1), -8.0), torch.zeros_like(means[:, :, :1]), x, sigma)


@pytest.mark.parametrize("nfe", [1, 3])
def test_policy_sample_follows_the_ode_and_calls_the_network_nfe_times(nfe):
    x_0, eps, calls = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), []

    def network(x, sigma, tau):
        calls.append((sigma[0].item(), tau[0].item()))
        return one_component(x, sigma, eps - x_0)

    got = policy_sample(network, eps, FlowSchedule(), nfe)
    assert_close(got, x_0, atol=1e-4, rtol=0)
    assert [tau for _, tau in calls] == FlowSchedule().segments(nfe)[:-1].tolist()
    assert [sigma for sigma, _ in calls] == pytest.approx([FlowSchedule().warp(tau) for _, tau in calls])


@pytest.mark.parametrize("h", [0.5, math.inf])
def test_an_sde_sample_does_not_depend_on_its_batch(h):
    x_0, eps = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)

    def sample(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return policy_sample(
            lambda x, sigma, tau: one_component(x, sigma, (eps - x_0)[rows]),
            eps[rows],
            FlowSchedule(),
            3,
            h=h,
            generators=generators,
        )

    assert_close(sample([0, 1, 2])[2:], sample([2]), atol=1e-5, rtol=0)
    assert (sample([0, 1, 2]) - eps + (eps - x_0)).abs().max() > 0.01  # noise was added


def test_flow_map_step_ends():
    assert flow_map_step(0.9, 0.5, 0.0) == (1.0, 0.5)
    assert flow_map_step(0.9, 0.5, math.inf) == (0.0, 0.0)
    assert flow_map_step(1 + 1e-16, 0.5, 0.7) == (0.0, 0.0)
    m, sigma_dst = flow_map_step(0.9, 0.5, 1.0)
    assert m == pytest.approx(1 / 9) and sigma_dst == pytest.approx(0.1)


def test_policy_sample_errors_name_value_and_option():
    eps = noise(2, 3, 4, 4)

    def dx(x, sigma, tau):
        return DXPolicy(noise(2, 5, 3, 4, 4), x, sigma)

    with pytest.raises(ValueError, match="nfe=2 .* 4 evaluations"):
        policy_sample(dx, eps, FlowSchedule(), 2, trained_nfe=4)
    with pytest.raises(ValueError, match="temperature"):
        policy_sample(dx, eps, FlowSchedule(), 4, temperature=0.3)
    with pytest.raises(ValueError, match="generators"):
        policy_sample(dx, eps, FlowSchedule(), 4, h=1.0, generators=[torch.Generator()])
    with pytest.raises(ValueError, match="h=-1"):
        policy_sample(dx, eps, FlowSchedule(), 4, h=-1.0)
    plain = policy_sample(dx, eps, FlowSchedule(), 4)
    assert_close(policy_sample(dx, eps, FlowSchedule(), 4, temperature="auto"), plain)
