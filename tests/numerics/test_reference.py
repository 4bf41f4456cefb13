"""The references themselves: Bayes' rule summed over a grid of clean pixels, no Gaussian algebra at all."""

import pytest
import torch
from torch import Tensor

from .cases import exact_velocity, gm_arrays, normal, relative_error_B, states_towards_components
from .exact import gm_velocity

CASES = [(1.0, 0.6), (1.0, 0.15), (0.9, 0.4), (0.7, 0.7), (0.5, 0.1), (0.2, 0.15)]


def grid_velocity(
    means_KC: Tensor, logstd: float, logweights_K: Tensor, x_src_C: Tensor, s: float, x_C: Tensor, t: float
) -> Tensor:
    """One pixel of one or two channels. The network's law of x_0, times what x adds, over what x_src had."""
    clean_KC, std = x_src_C - s * means_KC, s * torch.tensor(logstd, dtype=torch.float64).exp()
    low, high = clean_KC.min(0).values - 9 * std, clean_KC.max(0).values + 9 * std
    points = 20_001 if len(x_C) == 1 else 900
    axes = [torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    x0_PC = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    def log_normal(value_PC, mean_PC, scale):
        return -((value_PC - mean_PC) ** 2).sum(-1) / (2 * scale**2)

    log_law = torch.stack(
        [w + log_normal(x0_PC, m, std) for w, m in zip(logweights_K, clean_KC, strict=True)]
    ).logsumexp(0)
    log_p = log_law + log_normal(x_C, (1 - t) * x0_PC, t) - log_normal(x_src_C, (1 - s) * x0_PC, s)
    return (x_C - (log_p.softmax(0)[:, None] * x0_PC).sum(0)) / t


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("s, t", CASES)
def test_closed_forms_match_bayes_on_a_grid(s, t, channels):
    """Decimal reference, float64 reference and the package, all against the sum over the grid."""
    arrays = gm_arrays([s], components=3, channels=channels, space=(1, 1), logstd=-0.8, seed=int(100 * (s + 10 * t)))
    x = states_towards_components(arrays, torch.tensor([t], dtype=torch.float64), seed=7)
    pixel = (
        arrays.means[0, :, :, 0, 0],
        -0.8,
        arrays.logweights[0, :, 0, 0, 0],
        arrays.x_src[0, :, 0, 0],
        s,
        x[0, :, 0, 0],
        t,
    )
    want = grid_velocity(*pixel).view(1, channels, 1, 1)
    assert relative_error_B(torch.from_numpy(gm_velocity(*pixel)).view(1, channels, 1, 1), want) < 1e-9
    assert relative_error_B(arrays.reference()[0].velocity(x[0], t)[None], want) < 1e-9
    got = arrays.package().velocity(x, torch.tensor([t], dtype=torch.float64))
    assert relative_error_B(got, want) < 1e-9


@pytest.mark.parametrize("s, t", [(1.0, 0.5), (0.9, 0.05), (0.3, 0.3), (0.01, 0.004)])
def test_float64_reference_matches_the_decimal_one(s, t):
    arrays = gm_arrays([s], components=5, channels=4, space=(2, 1), seed=3)
    x = normal(1, 4, 2, 1, seed=5) * s
    want = exact_velocity(arrays, x, [t])
    assert relative_error_B(arrays.reference()[0].velocity(x[0], t)[None], want) < 1e-9
