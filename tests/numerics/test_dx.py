"""DXPolicy (grid and polynomial) against a plain loop over its nodes."""

from dataclasses import replace

import pytest
import torch

from .cases import F64, dx_arrays, normal, per_sample, relative_error_B
from .reference import warp

MODES = ["grid", "polynomial"]
SOURCES = [1.0, 0.95, 0.6, 0.3]


def reference_velocity(arrays, x, sigma_B):
    return torch.stack([p.velocity(x[b], sigma_B[b].item()) for b, p in enumerate(arrays.reference())])


def check(arrays, x, sigma_B, limit=1e-10):
    got = arrays.package().velocity(x, sigma_B)
    assert relative_error_B(got, reference_velocity(arrays, x, sigma_B)).max() < limit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nodes", [2, 3, 10])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_inside_the_segment(mode, nodes, shift):
    """On and between the nodes, at the source and at the end of the segment."""
    arrays = dx_arrays(SOURCES, mode=mode, nodes=nodes, shift=shift, seed=nodes)
    x = normal(*arrays.x_src.shape, seed=1)
    for part in (0.0, 0.03, 0.25, 0.5, 0.77, 1.0):
        sigma = []
        for reference in arrays.reference():
            tau_src = reference.s / (reference.s + shift * (1 - reference.s))
            tau_dst = max(tau_src - arrays.segment_size, 0.0)
            sigma.append(warp(tau_src + part * (tau_dst - tau_src), shift))
        check(arrays, x, torch.tensor(sigma, dtype=F64))


@pytest.mark.parametrize("mode", MODES)
def test_beyond_the_ends(mode):
    """Constant on the grid, above the source and below the segment; the polynomial just goes on."""
    arrays = dx_arrays([0.9, 0.6, 0.5], mode=mode, nodes=4, segment_size=0.1, seed=3)
    x = normal(*arrays.x_src.shape, seed=4)
    for sigma in ([0.95, 0.7, 0.999], [0.3, 0.2, 0.1], [1e-3, 0.05, 2e-4]):
        check(arrays, x, torch.tensor(sigma, dtype=F64))


def test_grid_by_hand():
    """Shift 1, two nodes: x_0 goes from c_0 at the end of the segment to c_1 at the source."""
    arrays = dx_arrays([0.8], nodes=2, segment_size=0.4, shift=1.0, channels=1, space=(1, 1))
    arrays.x_src.fill_(2.0)
    arrays.out[0, 0], arrays.out[0, 1] = 1.0, 3.0
    # c_0 = 2 - 0.8 = 1.2 at tau 0.4, c_1 = 2 - 2.4 = -0.4 at tau 0.8; x_0(0.7) = 0; u = (x - x_0)/0.7
    u = arrays.package().velocity(torch.full((1, 1, 1, 1), 0.35, dtype=F64), torch.tensor([0.7], dtype=F64))
    assert u.item() == pytest.approx(0.5, rel=1e-12)


def test_polynomial_by_hand():
    """Every coefficient is x_s - s out_i, the higher ones too."""
    arrays = dx_arrays([0.8], mode="polynomial", nodes=3, shift=1.0, channels=1, space=(1, 1))
    arrays.x_src.fill_(2.0)
    arrays.out[0, 0], arrays.out[0, 1], arrays.out[0, 2] = 1.0, 3.0, 0.0
    # c = 1.2, -0.4, 2; tau_src - tau = 0.3: x_0 = 1.2 - 0.12 + 0.18 = 1.26
    u = arrays.package().velocity(torch.full((1, 1, 1, 1), 1.01, dtype=F64), torch.tensor([0.5], dtype=F64))
    assert u.item() == pytest.approx(-0.5, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_last_segment_ends_at_zero_and_sigma_has_a_floor(mode):
    """Sources nearer to 0 than a segment; sigma below 1e-4 divides by 1e-4."""
    arrays = dx_arrays([0.3, 0.2, 0.02], mode=mode, nodes=4, segment_size=0.4, seed=5)
    x = normal(*arrays.x_src.shape, seed=6)
    for sigma in ([0.1, 0.19, 0.01], [1e-4, 2e-4, 0.5e-4], [1e-6, 1e-9, 0.0]):
        check(arrays, x, torch.tensor(sigma, dtype=F64))
    at_zero = arrays.package().velocity(x, torch.zeros(3, dtype=F64))
    assert at_zero.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    arrays = dx_arrays(SOURCES, mode=mode, nodes=5, seed=7)
    sigma_B = torch.tensor([0.9, 0.95, 0.41, 1e-5], dtype=F64)
    x0, cotangent = normal(*arrays.x_src.shape, seed=8), normal(*arrays.x_src.shape, seed=9)
    results = []
    for velocity in (lambda a, x: a.package().velocity(x, sigma_B), lambda a, x: reference_velocity(a, x, sigma_B)):
        leaves, x = arrays.leaves(), x0.clone().requires_grad_()
        results.append(torch.autograd.grad((velocity(leaves, x) * cotangent).sum(), (leaves.out, x)))
    for got, want in zip(*results, strict=True):
        assert relative_error_B(got, want).max() < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_frame_axis(mode):
    arrays = dx_arrays(SOURCES, mode=mode, nodes=3, space=(2, 2, 3), seed=10)
    x = normal(*arrays.x_src.shape, seed=11)
    check(arrays, x, arrays.sigma_src * 0.9)


@pytest.mark.parametrize("mode", MODES)
def test_float32(mode):
    """States on the way, where x - x_0 = sigma u is a small difference; down to the last substep (0.025)."""
    cases = [(s, s * part) for s in (1.0, 0.9, 0.5, 0.2) for part in (1.0, 0.99, 0.7, 0.4, 0.125) if s * part >= 0.025]
    arrays = dx_arrays([s for s, _ in cases], mode=mode, nodes=10, seed=12)
    sigma_B = torch.tensor([t for _, t in cases], dtype=torch.float32)
    x = arrays.x_src + per_sample(sigma_B.double() - arrays.sigma_src, arrays.x_src) * arrays.out[:, -1]
    arrays, x = arrays.to(torch.float32), x.float()
    got = arrays.package().velocity(x, sigma_B)
    assert got.dtype == torch.float32
    errors = relative_error_B(got, reference_velocity(arrays, x, sigma_B))
    assert errors.max() < 2e-4 and errors.median() < 1e-5
    print(f"{mode}: median {errors.median():.1e}, worst {errors.max():.1e}")


def test_segment_belongs_to_the_policy():
    """A step of another size reads the same curve: only segment_size and shift given at construction count."""
    long, short = dx_arrays([0.9], segment_size=0.5, seed=13), dx_arrays([0.9], segment_size=0.25, seed=13)
    x, sigma_B = normal(*long.x_src.shape, seed=14), torch.tensor([0.8], dtype=F64)
    assert not torch.allclose(long.package().velocity(x, sigma_B), short.package().velocity(x, sigma_B))
    other_shift = replace(long, shift=1.0)
    assert not torch.allclose(long.package().velocity(x, sigma_B), other_shift.package().velocity(x, sigma_B))
