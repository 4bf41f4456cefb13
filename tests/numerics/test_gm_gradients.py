"""Gradients of GMFlowPolicy.velocity with respect to means, logstd, log-weights and x."""

import pytest
import torch

from .cases import F64, GMArrays, gm_arrays, normal, states_on_path, states_towards_components
from .exact import gm_gradients

NAMES = ("means", "logstd", "logweights", "x")


def package_gradients(arrays: GMArrays, x, sigma_B, cotangent) -> dict[str, torch.Tensor]:
    leaves, x = arrays.leaves(), x.detach().clone().requires_grad_()
    u = leaves.package().velocity(x, sigma_B)
    return dict(zip(NAMES, torch.autograd.grad((u * cotangent).sum(), (*leaves.outputs(), x)), strict=True))


def reference_gradients(arrays: GMArrays, x, sigma_B, cotangent) -> dict[str, torch.Tensor]:
    leaves, x = arrays.leaves(), x.detach().clone().requires_grad_()
    u = torch.stack([p.velocity(x[b], sigma_B[b].item()) for b, p in enumerate(leaves.reference())])
    return dict(zip(NAMES, torch.autograd.grad((u * cotangent).sum(), (*leaves.outputs(), x)), strict=True))


def relative_errors(got: dict, want: dict) -> dict[str, torch.Tensor]:
    """Per sample and input, over the norm of that gradient; where it vanishes, over a hundredth of all together."""
    sizes = {name: want[name].double().flatten(1).norm(dim=1) for name in NAMES}
    whole = torch.stack(list(sizes.values())).norm(dim=0)
    errors = {name: (got[name].double() - want[name].double()).flatten(1).norm(dim=1) for name in NAMES}
    return {name: errors[name] / torch.maximum(sizes[name], whole / 100) for name in NAMES}


@pytest.mark.parametrize("seed", range(4))
def test_random_states(seed):
    """Several pixels share one logstd; every sample its own time."""
    arrays = gm_arrays([1.0, 0.9, 0.5, 0.1], components=4, space=(2, 2), normalised=seed % 2 == 0, seed=seed)
    sigma_B = arrays.sigma_src * torch.tensor([0.5, 1.0, 0.05, 0.7], dtype=F64)
    x, cotangent = (normal(*arrays.x_src.shape, seed=seed + offset) for offset in (60, 61))
    got, want = (f(arrays, x, sigma_B, cotangent) for f in (package_gradients, reference_gradients))
    for name, error_B in relative_errors(got, want).items():
        assert got[name].shape == want[name].shape
        assert error_B.max() < 1e-9, name


def corner_cases(logstds: tuple[float, ...]) -> tuple[GMArrays, torch.Tensor]:
    cases = [
        (s, s * part, logstd) for s in (0.01, 0.5, 1.0) for part in (1.0, 0.5, 1e-2, 1e-6, 0.0) for logstd in logstds
    ]
    arrays = gm_arrays(
        [c[0] for c in cases], components=3, channels=2, space=(1, 1), logstd=[c[2] for c in cases], seed=5
    )
    return arrays, torch.tensor([c[1] for c in cases], dtype=F64)


def exact_gradients(arrays: GMArrays, x, sigma_B, cotangent) -> dict[str, torch.Tensor]:
    """Single pixels: 100-digit differences."""
    rows = []
    for b in range(len(x)):
        rows.append(
            gm_gradients(
                arrays.means[b, :, :, 0, 0],
                arrays.logstds[b].item(),
                arrays.logweights[b, :, 0, 0, 0],
                arrays.x_src[b, :, 0, 0],
                arrays.sigma_src[b].item(),
                x[b, :, 0, 0],
                sigma_B[b].item(),
                cotangent_C=cotangent[b, :, 0, 0],
            )
        )
    return {name: torch.stack([torch.from_numpy(row[name]) for row in rows]) for name in NAMES}


def flat(gradients: dict) -> dict:
    return {name: value.reshape(len(value), -1) for name, value in gradients.items()}


@pytest.mark.parametrize("dtype, limit", [(F64, 1e-9), (torch.float32, 2e-4)])
def test_corners_of_time_against_100_digits(dtype, limit):
    """t at the source, and down to 0, where the gradients with respect to the network's outputs vanish."""
    arrays, sigma_B = corner_cases((-3.0, -1.0, 1.0))
    arrays, sigma_B = arrays.to(dtype), sigma_B.to(dtype)
    for x in (states_towards_components(arrays.to(F64), sigma_B.double(), seed=6), states_on_path(arrays, sigma_B)):
        x = x.to(dtype)
        cotangent = normal(*x.shape, seed=8).to(dtype)
        got, want = package_gradients(arrays, x, sigma_B, cotangent), exact_gradients(arrays, x, sigma_B, cotangent)
        for name, error_B in relative_errors(flat(got), flat(want)).items():
            worst = int(error_B.argmax())
            assert error_B.max() < limit, (
                f"{name}: {error_B.max():.1e} at s={arrays.sigma_src[worst]}, t={sigma_B[worst]}"
            )
            print(f"{dtype} d/d{name}: median {error_B.median():.1e}, worst {error_B.max():.1e}")


def test_components_without_weight_get_no_gradient_and_no_nan():
    arrays = gm_arrays([1.0, 0.6, 0.2], components=4, seed=9)
    arrays.logweights[:, 1] = -torch.inf
    others = [0, 2, 3]
    sigma_B, x = arrays.sigma_src * 0.5, normal(*arrays.x_src.shape, seed=10)
    cotangent = normal(*x.shape, seed=11)
    got = package_gradients(arrays, x, sigma_B, cotangent)
    fewer = GMArrays(
        arrays.means[:, others], arrays.logstds, arrays.logweights[:, others], arrays.x_src, arrays.sigma_src
    )
    want = reference_gradients(fewer, x, sigma_B, cotangent)
    assert (got["means"][:, 1] == 0).all() and (got["logweights"][:, 1] == 0).all()
    got["means"], got["logweights"] = got["means"][:, others], got["logweights"][:, others]
    for name, error_B in relative_errors(got, want).items():
        assert error_B.max() < 1e-9, name


def test_frame_axis():
    arrays = gm_arrays([1.0, 0.5], components=3, space=(2, 2, 1), seed=12)
    sigma_B = torch.tensor([0.6, 0.2], dtype=F64)
    x, cotangent = (normal(*arrays.x_src.shape, seed=seed) for seed in (13, 14))
    got, want = (f(arrays, x, sigma_B, cotangent) for f in (package_gradients, reference_gradients))
    for name, error_B in relative_errors(got, want).items():
        assert error_B.max() < 1e-9, name


def test_detach_cuts_the_network_off_but_not_x():
    arrays = gm_arrays([0.8], seed=15).leaves()
    x = normal(*arrays.x_src.shape, seed=16).requires_grad_()
    u = arrays.package().detach().velocity(x, torch.tensor([0.4], dtype=F64))
    grads = torch.autograd.grad(u.sum(), (*arrays.outputs(), x), allow_unused=True)
    assert all(grad is None for grad in grads[:3]) and grads[3] is not None
