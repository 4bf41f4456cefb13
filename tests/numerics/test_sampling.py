"""The samplers: the Euler teacher and the flow-map SDE over the student's segments."""

import math
from fractions import Fraction

import pytest
import torch

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import euler_sample, policy_sample

from .cases import F64, normal, relative_error_B, rng
from .mixture_law import three_blobs
from .reference import DX, GaussianMixture, flow_map, sample, unwarp, warp

LAW = three_blobs()
SHIFT = 3.2
SCHEDULE = FlowSchedule(shift=SHIFT)
BATCH = 2


def gm_student(x_BCHW, sigma_B, tau_B):
    """The exact law with its velocities bent a little, so that no formula holds by luck. Batched, for the package."""
    return gm_arrays_of(x_BCHW, sigma_B).package()


def gm_arrays_of(x_BCHW, sigma_B):
    arrays = LAW.network(x_BCHW, sigma_B)
    arrays.means = arrays.means + 0.1 * torch.sin(3 * arrays.means)
    return arrays


def gm_student_one(x_CHW, sigma) -> GaussianMixture:
    return gm_arrays_of(x_CHW[None], torch.tensor([sigma], dtype=x_CHW.dtype)).reference()[0]


def expected(x, predict, nfe, seeds, *, h=0.0, temperature=1.0, last_scale=0.5, total_substeps=128):
    """Per sample, in float64, with the noise its generator gives in the dtype of x."""
    ends = []
    for x_one, seed in zip(x, seeds, strict=True):
        generator = rng(seed)

        def noise(shape=x_one.shape, generator=generator):
            return torch.randn(shape, generator=generator, dtype=x.dtype).double()

        ends.append(
            sample(
                predict,
                x_one.double(),
                SHIFT,
                nfe,
                last_scale=last_scale,
                total_substeps=total_substeps,
                temperature=temperature,
                h=h,
                noise=noise,
            )
        )
    return torch.stack(ends)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("shift", [1.0, SHIFT])
def test_euler_teacher(steps, shift):
    x = normal(BATCH, 2, 2, 2, seed=1)
    want = x
    for i in range(steps):
        here, there = Fraction(steps - i, steps), Fraction(steps - i - 1, steps)
        sigma, lower = warp(float(here), shift), warp(float(there), shift)
        want = want + (lower - sigma) * LAW.velocity(want, torch.full((BATCH,), sigma, dtype=F64))
    got = euler_sample(LAW.velocity, x, FlowSchedule(shift=shift), steps)
    assert relative_error_B(got, want).max() < 1e-9


@pytest.mark.parametrize("h", [0.0, 0.3, 1.0, math.inf])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_flow_map_sde(h, nfe):
    x, seeds = normal(BATCH, 2, 2, 2, seed=2), [11, 12]
    got = policy_sample(gm_student, x, SCHEDULE, nfe, h=h, generators=[rng(seed) for seed in seeds])
    assert relative_error_B(got, expected(x, gm_student_one, nfe, seeds, h=h)).max() < 1e-8


def test_an_image_does_not_depend_on_its_batch():
    x, seeds = normal(3, 2, 2, 2, seed=3), [21, 22, 23]
    whole = policy_sample(gm_student, x, SCHEDULE, 4, h=0.5, generators=[rng(seed) for seed in seeds])
    alone = policy_sample(gm_student, x[1:2], SCHEDULE, 4, h=0.5, generators=[rng(22)])
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("last_scale, total_substeps", [(1.0, 128), (0.25, 32)])
def test_segment_sizes_and_substeps(last_scale, total_substeps):
    x = normal(BATCH, 2, 2, 2, seed=4)
    got = policy_sample(gm_student, x, SCHEDULE, 3, final_step_size_scale=last_scale, total_substeps=total_substeps)
    want = expected(x, gm_student_one, 3, [0] * BATCH, last_scale=last_scale, total_substeps=total_substeps)
    assert relative_error_B(got, want).max() < 1e-9


@pytest.mark.parametrize(
    "nfe, temperature, as_number",
    [(4, 0.3, 0.3), (4, "auto", 0.3), (2, "auto", 0.1), (1, "auto", 1.0), (12, "auto", 1.0), (8, "auto", 0.7)],
)
def test_temperature_at_every_step_but_the_last(nfe, temperature, as_number):
    x = normal(BATCH, 2, 2, 2, seed=5)
    got = policy_sample(gm_student, x, SCHEDULE, nfe, temperature=temperature)
    assert relative_error_B(got, expected(x, gm_student_one, nfe, [0] * BATCH, temperature=as_number)).max() < 1e-8


def test_more_steps_than_trained_but_not_fewer():
    x = normal(BATCH, 2, 2, 2, seed=6)
    for nfe in (4, 5, 9):
        got = policy_sample(gm_student, x, SCHEDULE, nfe, trained_nfe=4)
        assert relative_error_B(got, expected(x, gm_student_one, nfe, [0] * BATCH)).max() < 1e-8
    with pytest.raises(ValueError, match="nfe.*3"):
        policy_sample(gm_student, x, SCHEDULE, 3, trained_nfe=4)


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("nfe", [4, 6])
def test_dx_student(mode, nfe):
    """Its segment stays 1/3.5 when it is sampled in 6 steps."""

    def outputs(x_BCHW, sigma_B):
        base = LAW.velocity(x_BCHW, sigma_B)
        return torch.stack([base, 0.3 * torch.sin(base), 0.2 * base], 1)

    def student(x_BCHW, sigma_B, tau_B):
        from piflow_dist.policies import DXPolicy

        return DXPolicy(outputs(x_BCHW, sigma_B), x_BCHW, sigma_B, segment_size=1 / 3.5, shift=SHIFT, mode=mode)

    def student_one(x_CHW, sigma):
        out = outputs(x_CHW[None], torch.tensor([sigma], dtype=F64))[0]
        return DX(out, x_CHW, sigma, 1 / 3.5, SHIFT, mode)

    x = normal(BATCH, 2, 2, 2, seed=7)
    got = policy_sample(student, x, SCHEDULE, nfe)
    assert relative_error_B(got, expected(x, student_one, nfe, [0] * BATCH)).max() < 1e-8


def test_the_network_is_asked_at_the_segment_starts():
    seen = []

    def student(x_BCHW, sigma_B, tau_B):
        seen.append((sigma_B.double().tolist(), tau_B.double().tolist()))
        return gm_student(x_BCHW, sigma_B, tau_B)

    policy_sample(student, normal(BATCH, 2, 2, 2, seed=8), SCHEDULE, 4)
    for (sigma_B, tau_B), tau in zip(seen, [1, 5 / 7, 3 / 7, 1 / 7], strict=True):
        assert tau_B == pytest.approx([tau] * BATCH, abs=1e-7)
        assert sigma_B == pytest.approx([warp(tau, SHIFT)] * BATCH, abs=1e-7)


@pytest.mark.parametrize("h", [0.4, 1.0, 2.0, math.inf])
def test_flow_map_step_keeps_the_law_of_the_marginals(h):
    """The coefficients by themselves: x_dst at sigma_dst plus the noise has signal 1 - sigma_to and noise sigma_to."""
    for sigma_src, sigma_to in [(1.0, 0.8), (0.9, 0.5), (0.5, 0.05), (0.3, 0.0)]:
        m, sigma_dst, scale = flow_map(sigma_src, sigma_to, h)
        assert scale * (1 - sigma_dst) == pytest.approx(1 - sigma_to, abs=1e-12)
        assert (scale * sigma_dst) ** 2 + sigma_to**2 * (1 - m * m) == pytest.approx(sigma_to**2, abs=1e-12)
        assert 0 <= sigma_dst <= sigma_to and 0 <= unwarp(sigma_dst, SHIFT) <= 1


def test_float32():
    x, seeds = normal(BATCH, 2, 2, 2, seed=9).float(), [31, 32]
    for h in (0.0, 0.5):
        got = policy_sample(gm_student, x, SCHEDULE, 4, h=h, generators=[rng(seed) for seed in seeds])
        assert got.dtype == torch.float32
        assert relative_error_B(got, expected(x, gm_student_one, 4, seeds, h=h)).max() < 2e-4


def test_noise_of_the_sde_has_the_right_size():
    """h = inf, two steps, a student that always says x_0 = 0: the state between them is sigma_to times fresh noise."""
    states = []

    def student(x_BCHW, sigma_B, tau_B):
        states.append(x_BCHW)
        law = three_blobs()
        law.centres, law.std = torch.zeros_like(law.centres), 1e-3
        return law.network(x_BCHW, sigma_B).package()

    x = normal(2, 2, 100, 100, seed=10)
    policy_sample(student, x, SCHEDULE, 2, h=math.inf, generators=[rng(1), rng(2)])
    sigma_to = warp(1 / 3, SHIFT)
    spread_B = states[1].flatten(1).std(dim=1) / sigma_to
    assert spread_B.sub(1).abs().max() < 0.02
    assert abs(torch.corrcoef(states[1].flatten(1))[0, 1].item()) < 0.03
    assert abs(torch.corrcoef(torch.stack([states[1].flatten(), x.flatten()]))[0, 1].item()) < 0.03
