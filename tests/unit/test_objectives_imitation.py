"""The imitation steps of distill/objectives.py, on data and from noise, against what can be worked out by hand.

B batch, C latent channels, H W latent size, M intermediate states, N nodes of a DX policy. A DX policy whose nodes are
all v walks a straight line with velocity v, whatever the substeps.
"""

import pytest
import torch
from closed_form import (
    EMPTY_TONE,
    SCHEDULE,
    C,
    H,
    Network,
    W,
    column,
    make_batch,
    noise_in,
    normal,
    seeded,
    tone,
    tones,
)
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.config import Config, DataConfig, DistillConfig, GuidanceConfig, ModelConfig, PolicyConfig
from piflow_dist.distill import objectives
from piflow_dist.distill.objectives import Batch
from piflow_dist.flow.solvers import policy_sample
from piflow_dist.models.heads import make_policy

LOSS_SCALE, GUIDANCE = 6.0, 2.5
TAUS = torch.tensor([7, 5, 3, 1, 0]) / 7
"""Boundaries of 4 segments, the last of half the length."""


def distillation(policy: PolicyConfig | None = None, guidance_embeds: bool = False, **distill) -> Config:
    values = {"loss_scale": LOSS_SCALE, "guidance": GuidanceConfig(scale=GUIDANCE)} | distill
    return Config(
        run_dir="unused",
        objective="imitation",
        model=ModelConfig(guidance_embeds=guidance_embeds),
        policy=policy or PolicyConfig(type="dx", num_nodes=3),
        distill=DistillConfig(teacher="unused", **values),
        data=DataConfig(root="unused"),
    )


def straight_student(seed: int = 3) -> tuple[Tensor, Network]:
    v_CHW = normal(C, H, W, seed=seed).requires_grad_()
    return v_CHW, Network(lambda x, *_: {"out": v_CHW.expand(len(x), 3, C, H, W)})


def toned_teacher() -> Network:
    return Network(lambda x, sigma, text, mask: column(tone(text, mask)).expand_as(x))


def guided_tones(B: int) -> Tensor:
    return column(tones(B) + (GUIDANCE - 1) * (tones(B) - EMPTY_TONE)).double()


def sigmas_asked(teacher: Network, B: int) -> Tensor:
    """(states, B), whether the teacher was asked state by state or at once; conditional rows come first."""
    return torch.cat([call.sigma.chunk(2)[0].reshape(-1, B) for call in teacher.calls]).double()


def gradient_of_straight_loss(v_CHW: Tensor, sigma_src_B: Tensor, sigma_MB: Tensor) -> Tensor:
    """x_0 = x_s - s v and u = (x - x_0)/sigma at a state x that is held fixed: du/dv = s/sigma, along the window too."""
    error_BCHW = v_CHW.detach().double() - guided_tones(len(sigma_src_B))
    ratio_B = (sigma_src_B.double() / sigma_MB).mean(0)
    return LOSS_SCALE * (column(ratio_B) * error_BCHW).mean(0) / (C * H * W)


def straight_loss(v_CHW: Tensor, B: int) -> Tensor:
    return LOSS_SCALE / 2 * (v_CHW.detach().double() - guided_tones(B)).square().mean()


def on_data(config: Config, student: Network, batch: Batch, step: int = 0, scale: float = 1.0, seed: int = 5):
    teacher = toned_teacher()
    loss = objectives.imitation_data_step(student, teacher, batch, config, SCHEDULE, step, scale, seeded(seed))
    return loss, teacher


def from_noise(config: Config, student: Network, batch: Batch, step: int = 0, scale: float = 1.0, seed: int = 5):
    teacher = toned_teacher()
    loss = objectives.imitation_datafree_step(student, teacher, batch, config, SCHEDULE, step, scale, seeded(seed))
    return loss, teacher


@pytest.mark.parametrize("stack", [True, False])
def test_imitation_on_data(stack: bool) -> None:
    """Loss, gradient, sources at the segments' starts in proportion to their lengths, states on the way to their ends."""
    B, batch, (v_CHW, student) = 350, make_batch(350), straight_student()
    loss, teacher = on_data(distillation(stack_teacher_states=stack), student, batch, scale=0.25)
    (call,) = student.calls
    assert_close(loss.double(), straight_loss(v_CHW, B), rtol=1e-4, atol=0)
    assert student.losses == [pytest.approx(0.25 * loss.item())] and not loss.requires_grad
    want_CHW = 0.25 * gradient_of_straight_loss(v_CHW, call.sigma, sigmas_asked(teacher, B))
    assert_close(v_CHW.grad.double(), want_CHW, rtol=1e-3, atol=1e-4)
    assert torch.equal(call.text, batch.text_BLD) and torch.equal(call.mask, batch.mask_BL) and call.guidance is None
    segment_B = (call.sigma[:, None] - SCHEDULE.warp(TAUS[:-1])).abs().argmin(1)
    assert_close(call.sigma, SCHEDULE.warp(TAUS[segment_B]))
    for segment, share in enumerate((2 / 7, 2 / 7, 2 / 7, 1 / 7)):
        assert (segment_B == segment).double().mean().item() == pytest.approx(share, abs=4 * (share / B) ** 0.5)
    noise = noise_in(call.x, batch.x0_BCHW, call.sigma)
    assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert len(teacher.calls) == (1 if stack else 2)
    for state in teacher.calls:
        for x, sigma in zip(state.x.split(B), state.sigma.split(B), strict=True):
            assert_close(x, call.x + column(sigma - call.sigma) * v_CHW.detach(), rtol=0, atol=1e-5)
            assert (sigma <= call.sigma + 1e-6).all() and (sigma > SCHEDULE.warp(TAUS[segment_B + 1])).all()


def test_scheduled_mixing_follows_the_teacher_at_first_and_the_policy_at_last() -> None:
    config, B = distillation(num_decay_iters=10), 6
    assert [objectives.teacher_ratio(step, config) for step in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
    assert objectives.teacher_ratio(0, distillation()) == 0.0
    for step, slope in ((0, guided_tones(B).float()), (10, straight_student()[0].detach())):
        _, teacher = on_data(config, student := straight_student()[1], make_batch(B), step)
        source, x, sigma = student.calls[0], teacher.calls[-1].x[-B:], teacher.calls[-1].sigma[-B:]  # the last state
        assert (source.sigma - sigma).max() > 0.01
        assert_close(x, source.x + column(sigma - source.sigma) * slope, rtol=0, atol=1e-4)


def test_imitation_from_noise() -> None:
    """One backward a segment before the next is entered, where the policy ended; each weighs its length."""
    B, batch, (v_CHW, student) = 6, make_batch(6), straight_student()
    loss, teacher = from_noise(distillation(), student, batch, scale=0.25)
    lengths = -TAUS.diff()
    assert student.order == ["forward", "backward"] * 4
    assert_close(loss.double(), straight_loss(v_CHW, B), rtol=1e-4, atol=0)
    assert student.losses == pytest.approx((0.25 * lengths * loss).tolist(), rel=1e-4)
    noise, want_CHW = student.calls[0].x, torch.zeros(C, H, W, dtype=torch.float64)
    for i, (call, sigma_MB) in enumerate(zip(student.calls, sigmas_asked(teacher, B).split(2), strict=True)):
        assert_close(call.sigma, SCHEDULE.warp(TAUS[i]).expand(B))
        assert_close(call.x, noise + (SCHEDULE.warp(TAUS[i]) - 1) * v_CHW.detach(), rtol=0, atol=1e-5)
        assert torch.equal(call.text, batch.text_BLD) and torch.equal(call.mask, batch.mask_BL)
        want_CHW += 0.25 * lengths[i] * gradient_of_straight_loss(v_CHW, call.sigma, sigma_MB)
    assert_close(v_CHW.grad.double(), want_CHW, rtol=1e-3, atol=1e-4)
    other = Batch(batch.x0_BCHW + 1, batch.text_BLD, batch.mask_BL, batch.empty_LD)
    from_noise(distillation(), again := straight_student()[1], other)
    assert torch.equal(again.calls[0].x, noise)  # the images are not looked at


def test_scheduled_mixing_from_noise_enters_each_segment_where_the_mixed_walk_ended() -> None:
    config, B = distillation(num_decay_iters=10, window_substeps=0), 6
    for step, slope in ((0, guided_tones(B).float()), (10, straight_student()[0].detach())):
        from_noise(config, student := straight_student()[1], make_batch(B), step)
        assert len(student.calls) == 4
        for i, call in enumerate(student.calls):
            walked = (SCHEDULE.warp(TAUS[i]) - 1) * slope
            assert_close(call.x, student.calls[0].x + walked, rtol=0, atol=1e-4)


def bent_outputs(kind: str, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    curves = torch.stack([torch.sin(3 * x), column(sigma) * x, x.roll(1, 0) - 1], dim=1)
    if kind == "dx":
        return {"out": curves}
    logweights = torch.stack([x[:, :1], -x[:, 1:2], x[:, :1] * 0], dim=1).log_softmax(1)
    return {"means": curves, "logstds": torch.full((len(x), 1, 1, 1, 1), -1.0), "logweights": logweights}


@pytest.mark.parametrize("kind", ["gmflow", "dx"])
def test_training_from_noise_walks_the_path_of_sampling(kind: str) -> None:
    policy, B = PolicyConfig(type=kind, num_components=3, num_nodes=3), 5
    config = distillation(policy, component_dropout=0.0, total_substeps=512)
    student = Network(lambda x, sigma, *_: {k: v.requires_grad_() for k, v in bent_outputs(kind, x, sigma).items()})
    from_noise(config, student, make_batch(B))
    seen = []

    def predict(x: Tensor, sigma: Tensor, tau: Tensor):
        seen.append((x, sigma))
        return make_policy(bent_outputs(kind, x, sigma), x, sigma, policy, 2 / 7, SCHEDULE.shift)

    policy_sample(predict, student.calls[0].x, SCHEDULE, 4, total_substeps=512)
    for call, (x, sigma) in zip(student.calls, seen, strict=True):
        assert_close(call.sigma, sigma)
        assert_close(call.x, x, rtol=0, atol=1e-3)
    assert (seen[1][0] - seen[0][0]).abs().max() > 0.1


@pytest.mark.parametrize("dropout, low, high", [(0.0, 0, 0), (0.5, 72, 128)])
def test_dropped_components_leave_the_trajectory(dropout: float, low: int, high: int) -> None:
    """Of two components one is dropped in half of the images (none in a quarter, none again where both would be): these
    walk straight along the other."""
    B, policy = 200, PolicyConfig(num_components=2)
    config = distillation(policy, component_dropout=dropout, num_intermediate_states=1)
    outputs = {"means": torch.ones(B, 2, C, H, W), "logstds": torch.full((B, 1, 1, 1, 1), -6.0)}
    outputs |= {"logweights": torch.full((B, 2, 1, H, W), 0.5).log()}
    outputs["means"][:, 1] = -1
    student = Network(lambda *_: {name: value.requires_grad_() for name, value in outputs.items()})
    (_, teacher) = on_data(config, student, make_batch(B))
    (source,), (state,) = student.calls, teacher.calls
    slope = (state.x[:B] - source.x) / column(state.sigma[:B] - source.sigma)
    straight_B = ((slope.abs() - 1).abs() < 0.01).flatten(1).all(1) & (slope.flatten(1).std(1) < 0.01)
    assert low <= straight_B.sum() <= high


def test_guidance_is_an_input_of_student_and_teacher_where_the_model_takes_it() -> None:
    for step in (on_data, from_noise):
        _, teacher = step(distillation(guidance_embeds=True), student := straight_student()[1], make_batch(4))
        for call in (*student.calls, *teacher.calls):
            assert torch.equal(call.guidance, torch.full_like(call.sigma, GUIDANCE))
            assert (tone(call.text, call.mask) >= 0).all()  # the teacher is not asked without a prompt


@pytest.mark.parametrize("step", [on_data, from_noise])
def test_all_noise_comes_from_the_generator(step) -> None:
    drawn = []
    for seed, global_seed in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(global_seed)
        loss, teacher = step(distillation(), student := straight_student()[1], make_batch(8), seed=seed)
        drawn.append([loss, *(value for call in (*student.calls, *teacher.calls) for value in (call.x, call.sigma))])
    first, again, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
