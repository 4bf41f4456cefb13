"""Policies and rollouts: what a caller may rely on. Formulas are checked against independent ones in tests/numerics."""

import math

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import DXPolicy, GMFlowPolicy, rollout, windowed_velocities, windowed_velocity
from piflow_dist.policies.rollout import substep_grid

SCHEDULE = FlowSchedule(3.2)
GRIDS = {"few components": (4, 5, (3, 2)), "many components": (7, 2, (3, 2)), "frames": (3, 4, (2, 3, 2))}


def gm_inputs(K=4, C=5, space=(3, 2), B=3, dtype=torch.float64, seed=0, spread=0.7):
    """means, logstds, logweights, x_src, sigma_src of a batch; the means of a pixel differ by about `spread`."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    means = normal(B, 1, C, *space) + spread * normal(B, K, C, *space)
    logstds = (0.3 * normal(B) - 1).reshape(B, *[1] * (means.dim() - 1))
    values = means, logstds, normal(B, K, 1, *space).log_softmax(1), normal(B, C, *space)
    return *(value.to(dtype) for value in values), torch.tensor([1.0, 0.8, 0.4]).repeat(B)[:B]


def dx_policy(mode="grid", B=3, N=10, space=(3, 2), dtype=torch.float64, seed=0, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(B, N, 5, *space, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    x_src = torch.randn(B, 5, *space, generator=g, dtype=torch.float64).to(dtype)
    return out, DXPolicy(out, x_src, torch.tensor([1.0, 0.8, 0.4]).repeat(B)[:B], mode=mode)


def tau_of(policy):
    return SCHEDULE.unwarp(policy.sigma_src_B)


def step_by_step(policy, x, tau_start, tau_end, total_substeps=128):
    """The rollout as a loop over samples and substeps that only asks for velocities."""
    ends = []
    for i in range(len(x)):
        length = tau_start[i] - tau_end[i]
        n = max(1, round((length * total_substeps).item())) if length > 0 else 0
        state = x
        for k in range(n):
            sigma, after = (SCHEDULE.warp((tau_start - j * length / n).clamp(min=0)) for j in (k, k + 1))
            state = state + (after - sigma)[i] * policy.velocity(state, sigma)
        ends.append(state[i])
    return torch.stack(ends)


def near(policy, x_src, tau):
    """A state off the policy's path, at the noise levels of tau."""
    drift = (SCHEDULE.warp(tau) - policy.sigma_src_B).reshape(-1, *[1] * (x_src.dim() - 1))
    g = torch.Generator().manual_seed(9)
    return x_src + drift * torch.randn(x_src.shape, generator=g, dtype=x_src.dtype)


@pytest.mark.parametrize("case", GRIDS)
def test_rollout_is_the_sum_of_its_velocities(case):
    K, C, space = GRIDS[case]
    inputs = gm_inputs(K, C, space)
    policy = GMFlowPolicy(*inputs)
    start = tau_of(policy)
    for drop in (torch.tensor([0.05, 0.2, 0.0]), torch.tensor([0.0, 0.0, 0.15]), torch.full((3,), 0.1)):
        got, sigma = rollout(policy, inputs[3], start, start - drop, SCHEDULE)
        assert_close(got, step_by_step(policy, inputs[3], start, start - drop), rtol=0, atol=1e-12)
        assert_close(sigma, SCHEDULE.warp(start - drop))
    x, start = near(policy, inputs[3], start - 0.08), start - 0.08
    end = (start - torch.tensor([0.03, 0.5, 0.1])).clamp(min=0)
    assert_close(rollout(policy, x, start, end, SCHEDULE)[0], step_by_step(policy, x, start, end), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", GRIDS)
def test_rollout_gradients_are_those_of_its_velocities(case):
    K, C, space = GRIDS[case]
    leaves = [value.requires_grad_() for value in gm_inputs(K, C, space)[:4]]
    policy = GMFlowPolicy(*leaves, torch.tensor([1.0, 0.8, 0.4]))
    start = tau_of(policy) - 0.05
    x = near(policy, leaves[3].detach(), start).requires_grad_()
    end = start - torch.tensor([0.03, 0.1, 0.0])
    weight = torch.randn_like(x)
    got = torch.autograd.grad((rollout(policy, x, start, end, SCHEDULE)[0] * weight).sum(), [*leaves, x])
    want = torch.autograd.grad((step_by_step(policy, x, start, end) * weight).sum(), [*leaves, x])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_windowed_velocity_is_the_mean_and_local_below_two_substeps():
    inputs = gm_inputs()
    policy, start = GMFlowPolicy(*inputs), tau_of(GMFlowPolicy(*inputs)) - 0.05
    x = near(policy, inputs[3], start)
    end = start - torch.tensor([3 / 128, 1.4 / 128, 0.0])
    got = windowed_velocity(policy, x, start, end, SCHEDULE)
    x_end, sigma_end = rollout(policy, x, start, end, SCHEDULE)
    mean = (x_end - x)[0] / (sigma_end - SCHEDULE.warp(start))[0]
    local = policy.velocity(x, SCHEDULE.warp(start))
    assert_close(got, torch.stack([mean, local[1], local[2]]), rtol=0, atol=1e-11)
    several = windowed_velocities(policy, [x, x + 1], [(start, end), (start, start)], SCHEDULE)
    assert_close(several[0], got)
    assert_close(several[1], policy.velocity(x + 1, SCHEDULE.warp(start)), rtol=0, atol=1e-11)


def test_several_backwards_from_one_policy():
    """Nothing that a policy keeps between calls may hold a graph."""
    leaves = [value.requires_grad_() for value in gm_inputs()[:3]]
    policy = GMFlowPolicy(*leaves, *gm_inputs()[3:])
    with torch.no_grad():
        rollout(policy, policy.x_src, tau_of(policy), tau_of(policy) - 0.1, SCHEDULE)
    first, second = (
        torch.autograd.grad(
            windowed_velocity(policy, policy.x_src, tau_of(policy), tau_of(policy) - 0.03, SCHEDULE).square().sum(),
            leaves,
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a.abs().max() > 0
        assert_close(a, b)


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_dx_rollout_is_the_sum_of_its_velocities_with_gradients(mode):
    out, policy = dx_policy(mode, requires_grad=True)
    start = tau_of(policy) - 0.02
    x = near(policy, policy.x_src, start).requires_grad_()
    end = (start - torch.tensor([0.5, 0.1, 0.0])).clamp(min=0)
    got, want = rollout(policy, x, start, end, SCHEDULE)[0], step_by_step(policy, x, start, end)
    assert_close(got, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), [out, x]),
        torch.autograd.grad((want * weight).sum(), [out, x]),
        strict=True,
    ):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_dx_at_its_source_and_at_the_end():
    out, policy = dx_policy()
    assert_close(policy.velocity(policy.x_src, policy.sigma_src_B), out[:, -1])  # the last node is the source's
    end, sigma = rollout(policy, policy.x_src, tau_of(policy), 0.0, SCHEDULE)
    assert end.isfinite().all() and (sigma == 0).all()
    assert policy.velocity(end, 0.0).isfinite().all()
    out_p, poly = dx_policy("polynomial")
    assert_close(poly.velocity(poly.x_src, poly.sigma_src_B), out_p[:, 0])


def test_gm_at_its_source_and_at_the_end():
    inputs = gm_inputs()
    policy = GMFlowPolicy(*inputs)
    assert_close(policy.velocity(inputs[3], policy.sigma_src_B), (inputs[0] * inputs[2].softmax(1)).sum(1))
    x = near(policy, inputs[3], torch.zeros(3))
    assert_close(policy.velocity(x, 0.0), -x)
    assert_close(policy.velocity(x, torch.zeros(3)), -x)


def test_finished_samples_are_untouched_and_batching_changes_nothing():
    inputs = gm_inputs(B=6)
    policy, start = GMFlowPolicy(*inputs), tau_of(GMFlowPolicy(*inputs)) - 0.01
    x = near(policy, inputs[3], start)
    lengths = torch.tensor([0.0, 0.02, 0.1, 0.0, 0.07, 0.001])
    together = rollout(policy, x, start, start - lengths, SCHEDULE)[0]
    assert torch.equal(together[[0, 3]], x[[0, 3]])
    for i in range(6):
        one = GMFlowPolicy(*(value[i : i + 1] for value in inputs))
        alone = rollout(one, x[i : i + 1], start[i : i + 1], (start - lengths)[i : i + 1], SCHEDULE)[0]
        assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
    still = rollout(policy, x, start, start, SCHEDULE)[0]
    assert torch.equal(still, x) and still is not x


def test_counts_round_half_to_even_and_time_stops_at_zero():
    inputs = gm_inputs()
    policy = GMFlowPolicy(*inputs)
    lengths = torch.tensor([2.5, 3.5, 0.2]) / 128
    grid = substep_grid(policy, inputs[3], torch.full((3,), 0.5), 0.5 - lengths, SCHEDULE, 128)
    assert grid.active == [3, 2, 1, 1] and grid.order_B.tolist() == [1, 0, 2]
    _, sigma = rollout(policy, inputs[3], torch.full((3,), 0.01), torch.full((3,), -0.02), SCHEDULE)
    assert (sigma == 0).all()


def test_times_that_run_backwards_are_an_error():
    inputs = gm_inputs()
    policy = GMFlowPolicy(*inputs)
    for start, end in ((0.5, 0.6), (1.2, 0.5), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="tau_start"):
            rollout(policy, inputs[3], start, end, SCHEDULE)
    with pytest.raises(ValueError, match="total_substeps=0"):
        rollout(policy, inputs[3], 0.5, 0.4, SCHEDULE, total_substeps=0)
    with pytest.raises(ValueError, match="3 samples"):
        rollout(policy, inputs[3], torch.ones(2), 0.4, SCHEDULE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_half_precision_inputs_are_computed_in_float32(dtype, kind):
    if kind == "gm":
        inputs = gm_inputs(dtype=dtype)
        low, full = GMFlowPolicy(*inputs), GMFlowPolicy(*(value.float() for value in inputs))
    else:
        out, low = dx_policy(dtype=dtype)
        full = DXPolicy(out.float(), low.x_src.float(), low.sigma_src_B.float())
    start = tau_of(low).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, sigma = rollout(low, low.x_src, start, start - 0.1, SCHEDULE)
        velocity = low.velocity(low.x_src, low.sigma_src_B)
    assert got.dtype == sigma.dtype == velocity.dtype == torch.float32
    assert_close(got, rollout(full, full.x_src, start, start - 0.1, SCHEDULE)[0])
    assert_close(velocity, full.velocity(full.x_src, full.sigma_src_B))


def test_float32_rollouts_lose_nothing_against_float64_velocities():
    """Sharp and wide mixtures, temperature, dropped components: worst 2e-4, typically 1e-5."""
    errors = []
    for logstd in (-3.0, -1.0, 1.0):
        for seed in range(3):
            inputs = list(gm_inputs(8, 16, (4, 4), dtype=torch.float32, seed=seed))
            inputs[1] = torch.full_like(inputs[1], logstd)
            policy, exact = GMFlowPolicy(*inputs), GMFlowPolicy(*(value.double() for value in inputs))
            if seed == 1:
                policy, exact = policy.with_temperature(0.3), exact.with_temperature(0.3)
            if seed == 2:
                policy, exact = (p.with_dropout(0.3, torch.Generator().manual_seed(1)) for p in (policy, exact))
            start = tau_of(policy).float() - 0.03
            x = near(policy, inputs[3].double(), start).float()
            got = rollout(policy, x, start, start - 0.09, SCHEDULE)[0] - x
            want = step_by_step(exact, x.double(), start.double(), start.double() - 0.09) - x
            errors.append(((got - want).abs().max() / want.square().mean().sqrt()).item())
    assert max(errors) < 2e-4 and sorted(errors)[len(errors) // 2] < 1e-5


def test_logweights_of_minus_infinity():
    inputs = list(gm_inputs())
    inputs[2] = inputs[2].clone()
    inputs[2][:, 1] = -math.inf
    inputs[2][0, :3, :, 0] = -math.inf
    leaves = [value.requires_grad_() for value in inputs[:3]]
    policy = GMFlowPolicy(*inputs)
    three = [0, 2, 3]
    kept = GMFlowPolicy(inputs[0][1:, three], inputs[1][1:], inputs[2][1:, three], inputs[3][1:], inputs[4][1:])
    for p in (policy, policy.with_temperature(0.3)):
        start = tau_of(policy)
        moved = rollout(p, inputs[3], start, start - 0.1, SCHEDULE)[0]
        grads = torch.autograd.grad(moved.square().sum() + p.velocity(moved, 0.3).sum(), leaves, retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[0][:, 1].abs().max() == 0
    start = tau_of(kept)
    assert_close(
        rollout(policy, inputs[3], tau_of(policy), tau_of(policy) - 0.1, SCHEDULE)[0][1:],
        rollout(kept, inputs[3][1:], start, start - 0.1, SCHEDULE)[0],
        rtol=0,
        atol=1e-12,
    )


def test_an_empty_mixture_and_a_clean_source_are_errors():
    inputs = list(gm_inputs())
    empty = inputs[2].clone()
    empty[1, :, 0, 2, 1] = -math.inf
    with pytest.raises(ValueError, match="-inf"):
        GMFlowPolicy(inputs[0], inputs[1], empty, *inputs[3:])
    with pytest.raises(ValueError, match="sigma_src"):
        GMFlowPolicy(*inputs[:4], torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize(
    "index, shape", [(0, (3, 4, 5, 2, 3)), (1, (1, 1, 1, 1, 1)), (2, (3, 4, 5, 3, 2)), (3, (3, 5, 3)), (4, (2,))]
)
def test_shapes_that_do_not_fit_are_errors(index, shape):
    inputs = list(gm_inputs())
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"\(.*\)"):
        GMFlowPolicy(*inputs)


def test_dx_errors():
    out, policy = dx_policy()
    with pytest.raises(ValueError, match="out of shape"):
        DXPolicy(out[:, :, :4], policy.x_src, 0.5)
    with pytest.raises(ValueError, match="policy.mode"):
        DXPolicy(out, policy.x_src, 0.5, mode="spline")
    with pytest.raises(ValueError, match="segment_size"):
        DXPolicy(out, policy.x_src, 0.5, segment_size=0.0)
    with pytest.raises(ValueError, match="temperature"):
        policy.with_temperature(0.5)
    with pytest.raises(ValueError, match="dropout"):
        policy.with_dropout(0.1)
    assert policy.with_temperature(1.0) is policy and policy.with_dropout(0.0) is policy


def test_temperature_sharpens_weights_and_variance():
    inputs = gm_inputs()
    policy = GMFlowPolicy(*inputs)
    by_hand = GMFlowPolicy(inputs[0], inputs[1] + math.log(0.3) / 2, (inputs[2] / 0.3).log_softmax(1), *inputs[3:])
    x = near(policy, inputs[3], torch.full((3,), 0.2))
    sigma = SCHEDULE.warp(0.1)
    assert_close(policy.with_temperature(0.3).velocity(x, sigma), by_hand.velocity(x, sigma), rtol=0, atol=1e-10)
    assert policy.with_temperature(1.0) is policy
    best = inputs[0].gather(1, inputs[2].argmax(1, keepdim=True).expand(-1, -1, 5, -1, -1)).squeeze(1)
    assert_close(policy.with_temperature(0.0).velocity(inputs[3], policy.sigma_src_B), best)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            policy.with_temperature(wrong)


def dropped(policy):
    return policy._mixture.logweights_BKP == -math.inf


def test_dropout_takes_whole_components_of_samples_and_never_all():
    inputs = gm_inputs(K=2, B=64)
    policy = GMFlowPolicy(*inputs).detach()
    lost = dropped(policy.with_dropout(0.7, torch.Generator().manual_seed(3)))
    assert (lost == lost[:, :, :1]).all()
    draw = torch.rand(64, 2, generator=torch.Generator().manual_seed(3)) < 0.7
    want = draw & ~draw.all(1, keepdim=True)
    assert torch.equal(lost[:, :, 0], want) and draw.all(1).any() and want.any()
    assert not dropped(policy).any()  # the policy itself is as it was
    assert policy.with_dropout(0.0) is policy
    with pytest.raises(ValueError, match="p=1"):
        policy.with_dropout(1.0)


def test_dropout_spares_samples_where_a_pixel_has_lost_its_components_already():
    inputs = list(gm_inputs(K=2, B=64))
    inputs[2] = inputs[2].clone()
    inputs[2][:, 0, 0, 0, 0] = -math.inf  # this pixel lives on component 1
    before = GMFlowPolicy(*inputs)
    after = dropped(before.with_dropout(0.5, torch.Generator().manual_seed(0)))
    assert not after[:, 1].any() and after[:, 0, 1:].any() and not after.all(1).any()


def test_detached_and_derived_policies_carry_no_gradient_and_share_the_products():
    leaves = [value.requires_grad_() for value in gm_inputs()[:3]]
    policy = GMFlowPolicy(*leaves, *gm_inputs()[3:])
    frozen = policy.detach().with_dropout(0.3, torch.Generator().manual_seed(0)).with_temperature(0.5)
    moved, _ = rollout(frozen, policy.x_src, tau_of(policy), 0.1, SCHEDULE)
    assert not moved.requires_grad
    assert rollout(policy, policy.x_src, tau_of(policy), 0.1, SCHEDULE)[0].requires_grad
    assert frozen._mixture.products is policy._mixture.products
    out, dx = dx_policy(requires_grad=True)
    assert not rollout(dx.detach(), dx.x_src, tau_of(dx), 0.1, SCHEDULE)[0].requires_grad


class Waits:
    """Counts what would make the host wait for an accelerator: scalars and lists read back from tensors."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def wrapper(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("kind", ["gm", "dx"])
@pytest.mark.parametrize("length", [0.05, 0.35])
def test_one_synchronisation_per_rollout_whatever_its_length(kind, length, monkeypatch):
    policy = GMFlowPolicy(*gm_inputs()) if kind == "gm" else dx_policy()[1]
    start = tau_of(policy)
    end = start - length * torch.tensor([1.0, 0.5, 0.1])
    waits = Waits(monkeypatch)
    rollout(policy, policy.x_src, start, end, SCHEDULE)
    assert waits.count == 1
    windowed_velocity(policy, policy.x_src, start, end, SCHEDULE)
    assert waits.count == 2
    policy.velocity(policy.x_src, 0.1)
    assert waits.count == 2
