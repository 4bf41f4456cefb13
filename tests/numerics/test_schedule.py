"""FlowSchedule against exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from piflow_dist.flow.schedule import FlowSchedule

TAUS = [0.0, 2**-20, 1 / 128, 0.125, 0.3, 0.5, 0.7, 0.99, 1.0]


def exact_warp(tau: float, shift: float) -> Fraction:
    """Noise odds times the shift: sigma/(1 - sigma) = shift tau/(1 - tau)."""
    if tau == 1:
        return Fraction(1)
    odds = Fraction(shift) * Fraction(tau) / (1 - Fraction(tau))
    return odds / (1 + odds)


@pytest.mark.parametrize("shift", [1.0, 3.2, math.exp(0.5), math.exp(1.15), 12.0])
def test_warp_and_unwarp_match_fractions(shift):
    schedule = FlowSchedule(shift=shift)
    want = torch.tensor([float(exact_warp(tau, shift)) for tau in TAUS], dtype=torch.float64)
    taus = torch.tensor(TAUS, dtype=torch.float64)
    torch.testing.assert_close(schedule.warp(taus), want, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.unwarp(want), taus, rtol=1e-13, atol=0)
    for tau, sigma in zip(TAUS, want.tolist(), strict=True):
        assert schedule.warp(tau) == pytest.approx(sigma, rel=1e-14, abs=0)
        assert schedule.unwarp(sigma) == pytest.approx(tau, rel=1e-13, abs=0)
    assert float(schedule.warp(1.0)) == 1 and float(schedule.warp(0.0)) == 0
    assert float(schedule.unwarp(1.0)) == 1 and float(schedule.unwarp(0.0)) == 0


def test_float32_warp_keeps_digits_and_ends():
    schedule = FlowSchedule(shift=3.2)
    taus = torch.tensor(TAUS, dtype=torch.float32)
    want = torch.tensor([float(exact_warp(tau, 3.2)) for tau in taus.tolist()], dtype=torch.float64)
    torch.testing.assert_close(schedule.warp(taus).double(), want, rtol=3e-7, atol=0)
    torch.testing.assert_close(schedule.unwarp(want.float()).double(), taus.double(), rtol=4e-7, atol=0)
    assert schedule.warp(taus)[0] == 0 and schedule.warp(taus)[-1] == 1


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("last_scale", [1.0, 0.5, 0.25])
def test_segments_match_fractions(nfe, last_scale):
    base = 1 / (nfe - 1 + Fraction(last_scale))
    sizes = [base] * (nfe - 1) + [Fraction(last_scale) * base]
    assert sum(sizes) == 1
    want = [float(1 - sum(sizes[:i])) for i in range(nfe + 1)]
    got = torch.as_tensor(FlowSchedule(shift=3.2).segments(nfe, last_scale))
    assert got.shape == (nfe + 1,)
    assert got[0] == 1 and got[-1] == 0
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=6e-8)


def test_segments_default_halves_the_last():
    got = torch.as_tensor(FlowSchedule(shift=3.2).segments(4)).double()
    want = torch.tensor([1, 5 / 7, 3 / 7, 1 / 7, 0], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=6e-8)


@pytest.mark.parametrize("tokens", [256, 1024, 1849, 4096])
def test_dynamic_shift_is_linear_in_its_logarithm(tokens):
    log_shift = Fraction(1, 2) + (Fraction(23, 20) - Fraction(1, 2)) * Fraction(tokens - 256, 4096 - 256)
    schedule = FlowSchedule.dynamic(tokens)
    assert schedule.shift == pytest.approx(math.exp(log_shift), rel=1e-12)
    assert float(schedule.warp(0.25)) == pytest.approx(float(exact_warp(0.25, math.exp(log_shift))), rel=1e-12)


def test_dynamic_shift_takes_other_anchors():
    schedule = FlowSchedule.dynamic(200, base_tokens=100, base_log_shift=0.2, max_tokens=300, max_log_shift=1.0)
    assert schedule.shift == pytest.approx(math.exp(0.6), rel=1e-12)
