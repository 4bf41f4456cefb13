"""GMFlowPolicy.velocity in float64 against Bayes' rule in 100-digit and float64 arithmetic."""

import itertools
import math

import pytest
import torch

from .cases import (
    F64,
    GMArrays,
    exact_velocity,
    gm_arrays,
    normal,
    relative_error_B,
    rng,
    states_between_components,
    states_on_path,
    states_towards_components,
)

EXACT = 1e-10


def package_velocity(arrays, x, sigma_B):
    return arrays.package().velocity(x, sigma_B)


def reference_velocity(policies, x, sigma_B):
    return torch.stack([p.velocity(x[b], sigma_B[b].item()) for b, p in enumerate(policies)])


@pytest.mark.parametrize("seed", range(6))
def test_random_states(seed):
    """Anywhere in space, every sample with its own source and time; also with log-weights that are not normalised."""
    sources = [1.0, 0.99, 0.9, 0.6, 0.3, 0.05]
    arrays = gm_arrays(sources, components=5, channels=4, space=(2, 2), normalised=seed % 2 == 0, seed=seed)
    part = torch.rand(len(sources), generator=rng(seed), dtype=F64) * 0.98 + 0.01
    sigma_B = arrays.sigma_src * part
    x = normal(*arrays.x_src.shape, seed=seed + 50)
    assert (
        relative_error_B(package_velocity(arrays, x, sigma_B), exact_velocity(arrays, x, sigma_B.tolist())).max()
        < EXACT
    )


@pytest.mark.parametrize("components", [1, 2, 8])
@pytest.mark.parametrize("logstd", [-3.0, -1.0, 1.0])
def test_corners_of_time(components, logstd):
    """Sources from 0.01 to 1; t up to the source itself and down to 0, on the policy's way there."""
    pairs = [(s, s * part) for s in (0.01, 0.2, 0.7, 1.0) for part in (1.0, 1 - 1e-9, 0.5, 1e-3, 1e-6, 0.0)]
    arrays = gm_arrays([s for s, _ in pairs], components=components, space=(1, 1), logstd=logstd, seed=components)
    sigma_B = torch.tensor([t for _, t in pairs], dtype=F64)
    x = states_towards_components(arrays, sigma_B, seed=9)
    got, want = package_velocity(arrays, x, sigma_B), exact_velocity(arrays, x, sigma_B.tolist())
    assert relative_error_B(got, want).max() < EXACT


def test_at_the_source_it_is_the_weighted_mean():
    arrays = gm_arrays([1.0, 0.4, 0.01], components=4, seed=2)
    want = (arrays.logweights.softmax(1) * arrays.means).sum(1)
    got = package_velocity(arrays, arrays.x_src, arrays.sigma_src)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_at_time_zero_it_is_minus_x():
    arrays = gm_arrays([1.0, 0.4, 0.01], components=4, seed=4)
    x = normal(*arrays.x_src.shape, seed=6)
    assert relative_error_B(package_velocity(arrays, x, torch.zeros(3, dtype=F64)), -x).max() < 1e-12


def test_single_component_and_single_pixel():
    """K = 1: the weights cannot matter."""
    arrays = gm_arrays([0.8], components=1, channels=16, space=(1, 1), seed=8)
    x, sigma_B = normal(1, 16, 1, 1, seed=9), torch.tensor([0.37], dtype=F64)
    got = package_velocity(arrays, x, sigma_B)
    assert relative_error_B(got, exact_velocity(arrays, x, [0.37])) < EXACT
    arrays.logweights = arrays.logweights - 5
    torch.testing.assert_close(package_velocity(arrays, x, sigma_B), got, rtol=1e-13, atol=0)


def test_identical_components_are_one():
    many = gm_arrays([0.9, 0.3], components=6, seed=10)
    many.means = many.means[:, :1].expand_as(many.means).clone()
    one = GMArrays(
        many.means[:, :1], many.logstds, torch.zeros_like(many.logweights[:, :1]), many.x_src, many.sigma_src
    )
    x, sigma_B = normal(*many.x_src.shape, seed=11), torch.tensor([0.5, 0.1], dtype=F64)
    assert relative_error_B(package_velocity(many, x, sigma_B), package_velocity(one, x, sigma_B)).max() < 1e-13


def dropped(arrays: GMArrays) -> GMArrays:
    """Two of the components without weight in sample 0, all but one in sample 1, single pixels of sample 2."""
    logweights = arrays.logweights.clone()
    logweights[0, [0, 3]] = -torch.inf
    logweights[1, 1:] = -torch.inf
    logweights[2, 2, ..., 0] = -torch.inf
    return GMArrays(arrays.means, arrays.logstds, logweights, arrays.x_src, arrays.sigma_src)


@pytest.mark.parametrize("part", [1.0, 0.4, 1e-6, 0.0])
def test_components_without_weight(part):
    arrays = dropped(gm_arrays([1.0, 0.6, 0.2], components=4, space=(1, 2), seed=12))
    sigma_B = arrays.sigma_src * part
    x = states_towards_components(gm_arrays([1.0, 0.6, 0.2], components=4, space=(1, 2), seed=12), sigma_B)
    got, want = package_velocity(arrays, x, sigma_B), exact_velocity(arrays, x, sigma_B.tolist())
    assert relative_error_B(got, want).max() < EXACT


@pytest.mark.parametrize("temperature", [0.1, 0.3, 0.7, 1.0])
def test_temperature(temperature):
    sources = [1.0, 0.6, 0.2]
    arrays = gm_arrays(sources, components=4, seed=14, normalised=False)
    for case in (arrays, dropped(arrays)):
        for part in (1.0, 0.8, 0.3):
            sigma_B = arrays.sigma_src * part
            x = states_towards_components(arrays, sigma_B, seed=15)
            cooled = [p.at_temperature(temperature) for p in case.reference()]
            want = reference_velocity(cooled, x, sigma_B)
            got = case.package().with_temperature(temperature).velocity(x, sigma_B)
            assert relative_error_B(got, want).max() < EXACT


def test_temperature_leaves_the_policy_itself_alone():
    arrays = gm_arrays([0.9], seed=16)
    policy, x, sigma_B = arrays.package(), normal(*arrays.x_src.shape, seed=17), torch.tensor([0.5], dtype=F64)
    before = policy.velocity(x, sigma_B)
    policy.with_temperature(0.2)
    policy.with_dropout(0.9, rng(0))
    assert torch.equal(policy.velocity(x, sigma_B), before)


def kept_components(policy, arrays: GMArrays, x, sigma_B) -> list[tuple[int, ...]]:
    """Per sample, the one set of components that explains the velocity of all pixels."""
    got = policy.velocity(x, sigma_B)
    count = arrays.means.shape[1]
    subsets = [c for size in range(1, count + 1) for c in itertools.combinations(range(count), size)]
    found = []
    for b, reference in enumerate(arrays.reference()):
        wants = torch.stack([reference.keep(list(subset)).velocity(x[b], sigma_B[b].item()) for subset in subsets])
        errors = (wants - got[b]).flatten(1).norm(dim=1) / got[b].norm()
        assert (errors < 1e-9).sum() == 1, (
            "no single subset of components, the same for all pixels, gives this velocity"
        )
        found.append(subsets[int(errors.argmin())])
    return found


def test_dropout_takes_whole_components_per_sample_and_never_all():
    """K = 3, p = 0.4: a subset of k components stays with chance 0.6^k 0.4^(3-k); nothing left means nothing lost."""
    batch, p = 600, 0.4
    arrays = gm_arrays([0.9] * batch, components=3, channels=2, space=(1, 3), seed=18)
    sigma_B = torch.full((batch,), 0.5, dtype=F64)
    x = normal(batch, 2, 1, 3, seed=19)
    found = kept_components(arrays.package().with_dropout(p, rng(20)), arrays, x, sigma_B)
    for subset in set(found) | {(0,), (1, 2), (0, 1, 2)}:
        chance = (1 - p) ** len(subset) * p ** (3 - len(subset)) + (p**3 if len(subset) == 3 else 0)
        spread = (chance * (1 - chance) / batch) ** 0.5
        assert abs(found.count(subset) / batch - chance) < 4 * spread, subset


def test_dropout_of_everything_or_nothing_changes_nothing():
    arrays = gm_arrays([0.9, 0.3], seed=21)
    x, sigma_B = normal(*arrays.x_src.shape, seed=22), arrays.sigma_src * 0.6
    plain = package_velocity(arrays, x, sigma_B)
    torch.testing.assert_close(
        arrays.package().with_dropout(0.0, rng(1)).velocity(x, sigma_B), plain, rtol=1e-13, atol=0
    )
    # 1 - 1e-12: a sample that would lose all its components, as both do here, loses none.
    torch.testing.assert_close(
        arrays.package().with_dropout(1 - 1e-12, rng(1)).velocity(x, sigma_B), plain, rtol=1e-13, atol=0
    )


def test_dropout_follows_its_generator():
    arrays = gm_arrays([0.9] * 20, seed=23)
    x, sigma_B = normal(*arrays.x_src.shape, seed=24), arrays.sigma_src * 0.6
    first, again, other = (arrays.package().with_dropout(0.4, rng(seed)).velocity(x, sigma_B) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_frame_axis_is_one_more_spatial_axis():
    arrays = gm_arrays([1.0, 0.5], components=4, space=(3, 2, 2), seed=25)
    x = normal(*arrays.x_src.shape, seed=26)
    assert x.shape == (2, 3, 3, 2, 2) and arrays.logstds.shape == (2, 1, 1, 1, 1, 1)
    sigma_B = torch.tensor([0.7, 0.2], dtype=F64)
    assert (
        relative_error_B(package_velocity(arrays, x, sigma_B), exact_velocity(arrays, x, sigma_B.tolist())).max()
        < EXACT
    )


def test_float32_typical_and_worst_corner():
    """Source 0.01 to 1, logstd -3 to 1, t from the source to 0, on three ways there; 8 components of 4 channels.

    Error: norm of the difference over the norm of the true velocity, per sample. Inputs are float32 numbers, so that
    only the arithmetic is measured.
    """
    parts = [1.0, 0.999, 0.9, 0.5, 0.1, 0.03, 1e-2, 1e-3]
    pairs = [(s, t) for s in (0.01, 0.05, 0.3, 0.7, 0.95, 1.0) for t in [*(s * part for part in parts), 1e-6, 0.0]]
    cases = [(s, t, logstd) for s, t in pairs for logstd in (-3.0, -2.0, -1.0, 0.0, 1.0)]
    arrays = gm_arrays(
        [c[0] for c in cases], components=8, channels=4, space=(2, 1), logstd=[c[2] for c in cases], seed=27
    )
    sigma_B = torch.tensor([c[1] for c in cases])
    arrays = arrays.to(torch.float32)
    exact_inputs = (arrays.to(F64), sigma_B.double())
    states = [
        states_towards_components(*exact_inputs, seed=28),
        states_between_components(*exact_inputs, seed=33),
        states_on_path(*exact_inputs),
    ]
    errors = []
    for x in states:
        got = package_velocity(arrays, x.float(), sigma_B)
        assert got.dtype == torch.float32
        errors.append(relative_error_B(got, exact_velocity(arrays, x.float(), sigma_B.tolist())))
    errors = torch.cat(errors)
    worst = cases[int(errors.argmax()) % len(cases)]
    assert errors.max() < 2e-4, f"worst {errors.max():.1e} at (s, t, logstd) = {worst}"
    assert errors.quantile(0.9) < 1e-5, f"nine in ten below {errors.quantile(0.9):.1e}"
    print(
        f"float32: median {errors.median():.1e}, 90 % {errors.quantile(0.9):.1e}, worst {errors.max():.1e} at {worst}"
    )


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_float32_of_sharpened_and_thinned_mixtures(temperature):
    """Narrower still, and with the heaviest component of each sample dropped: the same limits."""
    parts = [1.0, 0.99, 0.5, 0.1, 1e-2, 1e-3, 0.0]
    cases = [(s, s * part, logstd) for s in (0.01, 0.3, 1.0) for part in parts for logstd in (-3.0, -1.0, 1.0)]
    arrays = gm_arrays(
        [c[0] for c in cases], components=8, channels=4, space=(2, 1), logstd=[c[2] for c in cases], seed=34
    ).to(torch.float32)
    heaviest_B = arrays.logweights.flatten(2).sum(2).argmax(1)
    arrays.logweights[torch.arange(len(cases)), heaviest_B] = -torch.inf
    sigma_B = torch.tensor([c[1] for c in cases])
    cooled = arrays.to(F64)
    cooled.logweights = (cooled.logweights / temperature).log_softmax(1)
    cooled.logstds = cooled.logstds + math.log(temperature) / 2
    for x in (states_towards_components(cooled, sigma_B.double(), seed=35), states_on_path(cooled, sigma_B.double())):
        got = arrays.package().with_temperature(temperature).velocity(x.float(), sigma_B)
        errors = relative_error_B(got, exact_velocity(cooled, x.float(), sigma_B.tolist()))
        print(f"median {errors.median():.1e}, worst {errors.max():.1e} at {cases[int(errors.argmax())]}")
        assert errors.max() < 2e-4 and errors.quantile(0.9) < 1e-5


def test_low_precision_inputs_are_computed_in_float32():
    arrays = gm_arrays([0.9, 0.3], components=4, seed=29).to(torch.bfloat16)
    sigma_B = torch.tensor([0.5, 0.1])
    arrays.sigma_src = torch.tensor([0.9, 0.3])
    x = normal(*arrays.x_src.shape, seed=30).float()
    got = package_velocity(arrays, x, sigma_B)
    assert got.dtype == torch.float32
    assert relative_error_B(got, exact_velocity(arrays, x, sigma_B.tolist())).max() < 1e-5


def test_each_sample_has_its_own_time():
    arrays = gm_arrays([1.0, 0.5, 0.2], seed=31)
    x, sigma_B = normal(*arrays.x_src.shape, seed=32), torch.tensor([0.9, 0.1, 0.2], dtype=F64)
    whole = package_velocity(arrays, x, sigma_B)
    for b in range(3):
        one = GMArrays(*[value[b : b + 1] for value in vars(arrays).values()])
        alone = package_velocity(one, x[b : b + 1], sigma_B[b : b + 1])
        torch.testing.assert_close(alone, whole[b : b + 1], rtol=1e-12, atol=1e-13)
