"""guided_velocity against the sum written out."""

import pytest
import torch

from piflow_dist.flow.guidance import guided_velocity

from .cases import F64, normal, per_sample
from .reference import guided

U_COND, U_UNCOND, X = (normal(4, 3, 2, 2, seed=seed) for seed in (1, 2, 3))
SIGMA_B = torch.tensor([0.95, 0.7, 0.35, 0.05], dtype=F64)


def reference(scales, **options):
    return torch.stack(
        [guided(U_COND[b], U_UNCOND[b], scales[b], X[b], SIGMA_B[b].item(), **options) for b in range(4)]
    )


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_plain(scale):
    got = guided_velocity(U_COND, U_UNCOND, scale)
    torch.testing.assert_close(got, reference([scale] * 4), rtol=1e-13, atol=1e-14)


def test_acts_only_above_one():
    """1 and less: the conditional velocity, bit for bit."""
    for scale in (1.0, 0.5, 0.0):
        assert torch.equal(guided_velocity(U_COND, U_UNCOND, scale), U_COND)
    scales = [0.5, 1.0, 2.0, 7.0]
    got = guided_velocity(U_COND, U_UNCOND, torch.tensor(scales, dtype=F64))
    torch.testing.assert_close(got, reference(scales), rtol=1e-13, atol=1e-14)
    assert torch.equal(got[:2], U_COND[:2])


@pytest.mark.parametrize("interval", [(0.3, 0.8), (0.0, 0.5), (0.6, 1.0)])
@pytest.mark.parametrize("scale", [4.0, torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=F64)])
def test_interval(interval, scale):
    got = guided_velocity(U_COND, U_UNCOND, scale, sigma=SIGMA_B, interval=interval)
    scales = scale.tolist() if isinstance(scale, torch.Tensor) else [scale] * 4
    torch.testing.assert_close(got, reference(scales, interval=interval), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("orthogonal", [0.0, 0.4, 1.0])
def test_orthogonal(orthogonal):
    got = guided_velocity(U_COND, U_UNCOND, 4.0, x=X, sigma=SIGMA_B, orthogonal=orthogonal)
    torch.testing.assert_close(got, reference([4.0] * 4, orthogonal=orthogonal), rtol=1e-12, atol=1e-13)


def test_orthogonal_update_has_no_part_along_the_conditional_x0():
    update = guided_velocity(U_COND, U_UNCOND, 4.0, x=X, sigma=SIGMA_B, orthogonal=1.0) - U_COND
    x0 = X - per_sample(SIGMA_B, X) * U_COND
    assert (update * x0).flatten(1).sum(1).abs().max() < 1e-12
    assert update.flatten(1).norm(dim=1).min() > 0.1


def test_orthogonal_inside_an_interval():
    got = guided_velocity(U_COND, U_UNCOND, 4.0, x=X, sigma=SIGMA_B, orthogonal=1.0, interval=(0.3, 0.8))
    torch.testing.assert_close(got, reference([4.0] * 4, orthogonal=1.0, interval=(0.3, 0.8)), rtol=1e-12, atol=1e-13)


def test_frame_axis():
    got = guided_velocity(U_COND[:, :, None], U_UNCOND[:, :, None], 4.0, x=X[:, :, None], sigma=SIGMA_B, orthogonal=0.7)
    torch.testing.assert_close(got[:, :, 0], reference([4.0] * 4, orthogonal=0.7), rtol=1e-12, atol=1e-13)
