"""The EMA decay of karras et al. (arXiv 2312.02696): beta = (1 - 1/t)^(gamma + 1)."""

from fractions import Fraction

import pytest

from piflow_dist.distill.ema import karras_beta


@pytest.mark.parametrize("gamma", [1, 7, 16])
@pytest.mark.parametrize("step", [1, 2, 3, 100, 9000])
def test_beta_is_the_power_of_a_fraction(step, gamma):
    want = Fraction(step - 1, step) ** (gamma + 1)
    assert float(karras_beta(step, gamma)) == pytest.approx(float(want), rel=1e-12, abs=0)


def test_beta_of_a_gamma_that_is_not_whole():
    assert float(karras_beta(4, 6.94)) == pytest.approx(0.75**7.94, rel=1e-12)


def test_the_weights_of_an_average_follow_a_power_law():
    """From step 1 on the average of the values k nears t (gamma + 1)/(gamma + 2): the first is forgotten."""
    average, steps, gamma = 1e9, 2000, 7
    for step in range(1, steps + 1):
        beta = float(karras_beta(step, gamma))
        average = beta * average + (1 - beta) * step
    assert average / steps == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
