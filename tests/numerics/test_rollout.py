"""rollout against a Python loop over the substeps of each sample."""

import pytest
import torch

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import rollout

from .cases import F64, dx_arrays, gm_arrays, normal, relative_error_B
from .reference import rollout as loop
from .reference import substeps_of, warp

SHIFT = 3.2
SCHEDULE = FlowSchedule(shift=SHIFT)
STARTS = [1.0, 0.9375, 0.6875, 0.5, 0.28125, 0.125]
LENGTHS = [0.25, 0.3, 0.01, 0.0, 0.28125, 0.05]  # the fifth ends at tau = 0, the fourth goes nowhere


def reference_ends(policies, x, starts, ends, total_substeps, shift=SHIFT):
    return torch.stack(
        [loop(p.velocity, x[b], starts[b], ends[b], shift, total_substeps) for b, p in enumerate(policies)]
    )


def gm_case(**options):
    return gm_arrays([warp(tau, SHIFT) for tau in STARTS], seed=40, **options)


def dx_case(mode):
    return dx_arrays([warp(tau, SHIFT) for tau in STARTS], mode=mode, segment_size=0.3, seed=41)


CASES = {
    "gm": gm_case,
    "gm, one component": lambda: gm_case(components=1),
    "gm, frames": lambda: gm_case(space=(2, 2, 1)),
    "dx grid": lambda: dx_case("grid"),
    "dx polynomial": lambda: dx_case("polynomial"),
}


@pytest.mark.parametrize("total_substeps", [128, 32])
@pytest.mark.parametrize("case", CASES)
def test_lengths_differ_per_sample(case, total_substeps):
    arrays = CASES[case]()
    starts, ends = STARTS, [start - length for start, length in zip(STARTS, LENGTHS, strict=True)]
    got, sigma_end_B = rollout(
        arrays.package(),
        arrays.x_src,
        torch.tensor(starts, dtype=F64),
        torch.tensor(ends, dtype=F64),
        SCHEDULE,
        total_substeps,
    )
    want = reference_ends(arrays.reference(), arrays.x_src, starts, ends, total_substeps)
    moved = torch.tensor([length > 0 for length in LENGTHS])
    # The way covered, not the end point, which a wrong step would hardly move.
    assert relative_error_B((got - arrays.x_src)[moved], (want - arrays.x_src)[moved]).max() < 1e-10
    assert torch.equal(got[~moved], arrays.x_src[~moved])
    wanted_sigma = torch.tensor([warp(end, SHIFT) for end in ends], dtype=F64)
    torch.testing.assert_close(sigma_end_B.double(), wanted_sigma, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_from_the_middle_of_a_segment(case):
    """The start need not be the policy's source."""
    arrays = CASES[case]()
    starts = [start * 0.9 for start in STARTS]
    ends = [start * 0.4 for start in STARTS]
    x = normal(*arrays.x_src.shape, seed=42)
    got, _ = rollout(arrays.package(), x, torch.tensor(starts, dtype=F64), torch.tensor(ends, dtype=F64), SCHEDULE)
    assert relative_error_B(got - x, reference_ends(arrays.reference(), x, starts, ends, 128) - x).max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_source_state_at_a_later_time(case):
    """The very tensor the policy was made at, but read as a state further on: not the source."""
    arrays = CASES[case]()
    starts, ends = [start * 0.8 for start in STARTS], [start * 0.5 for start in STARTS]
    got, _ = rollout(
        arrays.package(), arrays.x_src, torch.tensor(starts, dtype=F64), torch.tensor(ends, dtype=F64), SCHEDULE
    )
    want = reference_ends(arrays.reference(), arrays.x_src, starts, ends, 128)
    assert relative_error_B(got - arrays.x_src, want - arrays.x_src).max() < 1e-10


HALVES = {0.5: 1, 1.5: 2, 2.5: 2, 3.5: 4, 4.5: 4, 5.5: 6, 0.25: 1, 2.49: 2, 2.51: 3}


@pytest.mark.parametrize("case", ["gm", "dx grid", "dx polynomial"])
def test_half_substeps_round_to_even(case):
    """Lengths of n + 1/2 substeps, exact in binary."""
    starts = [0.75] * len(HALVES)
    ends = [0.75 - half / 128 for half in HALVES]
    assert [substeps_of(0.75 - end, 128) for end in ends] == list(HALVES.values())
    sources = [warp(0.75, SHIFT)] * len(HALVES)
    arrays = gm_arrays(sources, seed=44) if case == "gm" else dx_arrays(sources, mode=case.split()[1], seed=44)
    # Far from the straight line, so that one substep more or less shows.
    x = arrays.x_src + 0.5 * normal(*arrays.x_src.shape, seed=45)
    got, _ = rollout(arrays.package(), x, torch.tensor(starts, dtype=F64), torch.tensor(ends, dtype=F64), SCHEDULE)
    assert relative_error_B(got - x, reference_ends(arrays.reference(), x, starts, ends, 128) - x).max() < 1e-10


def test_whole_trajectory_ends_at_tau_zero():
    """From noise to tau = 0 in one policy; ends below 0 are ends at 0."""
    arrays = gm_arrays([1.0, 1.0], logstd=[-2.0, 0.0], seed=46)
    one, zero = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    got, sigma_end_B = rollout(arrays.package(), arrays.x_src, one, zero, SCHEDULE)
    want = reference_ends(arrays.reference(), arrays.x_src, [1.0] * 2, [0.0] * 2, 128)
    assert relative_error_B(got, want).max() < 1e-10
    assert (sigma_end_B == 0).all()


def test_all_samples_of_zero_length():
    arrays = gm_arrays([0.9, 0.2], seed=47)
    tau_B = torch.tensor([SCHEDULE.unwarp(0.9), 0.0], dtype=F64)
    got, sigma_end_B = rollout(arrays.package(), arrays.x_src, tau_B, tau_B, SCHEDULE)
    assert torch.equal(got, arrays.x_src)
    torch.testing.assert_close(sigma_end_B.double(), torch.tensor([0.9, 0.0], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature, drop", [(0.3, None), (1.0, 1), (0.5, 2)])
def test_with_temperature_and_missing_components(temperature, drop):
    arrays = gm_case()
    if drop is not None:
        arrays.logweights[::2, drop] = -torch.inf
    ends = [start * 0.5 for start in STARTS]
    got, _ = rollout(
        arrays.package().with_temperature(temperature),
        arrays.x_src,
        torch.tensor(STARTS, dtype=F64),
        torch.tensor(ends, dtype=F64),
        SCHEDULE,
    )
    want = reference_ends([p.at_temperature(temperature) for p in arrays.reference()], arrays.x_src, STARTS, ends, 128)
    assert relative_error_B(got - arrays.x_src, want - arrays.x_src).max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    arrays = CASES[case]().to(torch.float32)
    starts = torch.tensor(STARTS)
    ends = torch.tensor([start - length for start, length in zip(STARTS, LENGTHS, strict=True)])
    got, _ = rollout(arrays.package(), arrays.x_src, starts, ends, SCHEDULE)
    assert got.dtype == torch.float32
    want = reference_ends(arrays.reference(), arrays.x_src.double(), starts.tolist(), ends.tolist(), 128)
    moved = torch.tensor([length > 0 for length in LENGTHS])
    error_B = relative_error_B((got - arrays.x_src)[moved], (want - arrays.x_src.double())[moved])
    assert error_B.max() < 2e-4 and error_B.median() < 1e-5
    print(f"{case}: median {error_B.median():.1e}, worst {error_B.max():.1e}")


@pytest.mark.parametrize("channels, components", [(4, 8), (16, 2)])
def test_float32_worst_corners(channels, components):
    """From sources 1 to 0.05 all the way to 0, logstd -3 to 1: relative to the way covered, and to the end."""
    cases = [(s, logstd) for s in (1.0, 0.9, 0.5, 0.05) for logstd in (-3.0, -2.0, -1.0, 0.0, 1.0)]
    arrays = gm_arrays(
        [s for s, _ in cases], components=components, channels=channels, logstd=[c[1] for c in cases], seed=49
    )
    arrays = arrays.to(torch.float32)
    starts = SCHEDULE.unwarp(arrays.sigma_src)
    for x in (
        arrays.x_src,
        (arrays.x_src + 0.1 * arrays.sigma_src.view(-1, 1, 1, 1) * normal(*arrays.x_src.shape, seed=50)),
    ):
        x = x.float()
        got, _ = rollout(arrays.package(), x, starts, torch.zeros(len(cases)), SCHEDULE)
        want = reference_ends(arrays.reference(), x.double(), starts.tolist(), [0.0] * len(cases), 128)
        error_B = relative_error_B(got - x, want - x.double())
        print(
            f"median {error_B.median():.1e}, worst {error_B.max():.1e} at (s, logstd) = {cases[int(error_B.argmax())]}"
        )
        assert error_B.max() < 2e-4 and error_B.median() < 1e-5


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_float32_of_sharpened_and_thinned_mixtures(temperature):
    """A temperature, and the heaviest component dropped: the straight line through the source leaves the mixture."""
    cases = [(s, logstd) for s in (1.0, 0.9, 0.5, 0.05) for logstd in (-3.0, -2.0, -1.0, 0.0, 1.0)]
    arrays = gm_arrays([s for s, _ in cases], components=8, channels=4, logstd=[c[1] for c in cases], seed=51).to(
        torch.float32
    )
    heaviest_B = arrays.logweights.flatten(2).sum(2).argmax(1)
    arrays.logweights[torch.arange(len(cases)), heaviest_B] = -torch.inf
    starts, x = SCHEDULE.unwarp(arrays.sigma_src), arrays.x_src
    got, _ = rollout(arrays.package().with_temperature(temperature), x, starts, torch.zeros(len(cases)), SCHEDULE)
    cooled = [p.at_temperature(temperature) for p in arrays.reference()]
    want = reference_ends(cooled, x.double(), starts.tolist(), [0.0] * len(cases), 128)
    error_B = relative_error_B(got - x, want - x.double())
    print(f"median {error_B.median():.1e}, worst {error_B.max():.1e} at (s, logstd) = {cases[int(error_B.argmax())]}")
    assert error_B.max() < 2e-4 and error_B.median() < 1e-5


def test_gm_rollout_near_the_source_at_001():
    """The smallest source, the narrowest components: float32, relative to the way covered."""
    tau = SCHEDULE.unwarp(0.01)
    arrays = gm_arrays([0.01] * 5, components=8, logstd=[-3.0, -2.0, -1.0, 0.0, 1.0], seed=48).to(torch.float32)
    x, start = arrays.x_src, torch.full((5,), tau)
    got, _ = rollout(arrays.package(), x, start, torch.zeros(5), SCHEDULE, total_substeps=16 * 128)
    want = reference_ends(arrays.reference(), x.double(), start.tolist(), [0.0] * 5, 16 * 128)
    assert relative_error_B(got - x, want - x.double()).max() < 2e-4
