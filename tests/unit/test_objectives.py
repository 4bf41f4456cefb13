"""distill/objectives.py with networks of closed form: what they are asked, what the loss is, where the noise comes from.

B batch, C latent channels, H W latent size, L text tokens, D width, M intermediate states, N nodes of a DX policy.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.config import (
    Config,
    DataConfig,
    DistillConfig,
    GuidanceConfig,
    ModelConfig,
    PolicyConfig,
    ScheduleConfig,
    TrainConfig,
)
from piflow_dist.distill import objectives
from piflow_dist.distill.objectives import Batch, TeacherVelocity
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import policy_sample
from piflow_dist.models.heads import make_policy

C, H, W, L, D = 3, 2, 2, 4, 2
SHIFT = 3.2
SCHEDULE = FlowSchedule(SHIFT)
EMPTY_TONE = -1.5
LOSS_SCALE, GUIDANCE = 6.0, 2.5
TAUS = torch.tensor([7, 5, 3, 1, 0]) / 7
"""Boundaries of 4 segments, the last of half the length."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(value_B: Tensor) -> Tensor:
    return value_B.reshape(-1, 1, 1, 1)


def make_batch(B: int, empty_tokens: int = 2) -> Batch:
    """Prompts of 1 to L tokens that all hold the prompt's tone, 0, 1, 2 ...; 99 where the mask is off."""
    mask_BL = torch.arange(L) <= torch.arange(B)[:, None] % L
    text_BLD = torch.where(mask_BL[..., None], torch.arange(B)[:, None, None].float(), 99.0).expand(B, L, D)
    return Batch(normal(B, C, H, W, seed=1) + 2, text_BLD, mask_BL, torch.full((empty_tokens, D), EMPTY_TONE))


def tone(text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return (text_BLD.mean(2) * mask_BL).sum(1) / mask_BL.sum(1)


class Network:
    """Notes what it is asked and in which order; gradients add up as in the engine."""

    def __init__(self, answer):
        self.answer, self.calls, self.order, self.losses = answer, [], [], []

    def __call__(self, x, sigma, text, mask, guidance=None):
        self.order.append("forward")
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, text=text, mask=mask, guidance=guidance))
        return self.answer(x, sigma, text, mask)

    def backward(self, loss: Tensor) -> None:
        self.order.append("backward")
        self.losses.append(loss.item())
        loss.backward()


def prompted_field(x, sigma, text, mask):
    return column(tone(text, mask)) + 0.5 * column(sigma) * x


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


# The teacher.

GUIDANCES = {
    "none": GuidanceConfig(scale=1.0),
    "plain": GuidanceConfig(scale=2.5),
    "interval": GuidanceConfig(scale=2.5, interval=[0.3, 0.7]),
    "orthogonal": GuidanceConfig(scale=2.5, orthogonal=0.5),
}


@pytest.mark.parametrize("empty_tokens", [2, L + 2])
@pytest.mark.parametrize("name", GUIDANCES)
def test_teacher_velocity_row_by_row(name: str, empty_tokens: int) -> None:
    """Two states a prompt, state after state: each row is the guided velocity at its own prompt and noise level."""
    B, guidance, teacher = 3, GUIDANCES[name], Network(prompted_field)
    x_BCHW, sigma_B = normal(2 * B, C, H, W, seed=2), torch.tensor([0.9, 0.6, 0.2, 0.8, 0.5, 0.1])
    u_BCHW = TeacherVelocity(teacher, make_batch(B, empty_tokens), guidance)(x_BCHW, sigma_B)
    (call,) = teacher.calls
    assert len(call.x) == (2 * B if name == "none" else 4 * B) and call.guidance is None
    for i, (x, sigma) in enumerate(zip(x_BCHW.double(), sigma_B.double(), strict=True)):
        u_cond, u_uncond = i % B + 0.5 * sigma * x, EMPTY_TONE + 0.5 * sigma * x
        low, high = guidance.interval
        update = (guidance.scale - 1) * (u_cond - u_uncond) * (low <= sigma <= high)
        x_0 = x - sigma * u_cond
        update = update - guidance.orthogonal * (update * x_0).sum() / x_0.square().sum() * x_0
        assert_close(u_BCHW[i].double(), u_cond + update, rtol=1e-5, atol=1e-5)


def test_teacher_that_takes_the_scale_is_asked_once_with_the_prompt_alone() -> None:
    B, teacher = 3, Network(prompted_field)
    x_BCHW, sigma_B = normal(2 * B, C, H, W), torch.linspace(0.1, 1, 2 * B)
    u_BCHW = TeacherVelocity(teacher, make_batch(B), GuidanceConfig(scale=3.5), embedded=True)(x_BCHW, sigma_B)
    (call,) = teacher.calls
    assert torch.equal(call.guidance, torch.full((2 * B,), 3.5))
    assert_close(u_BCHW, column(torch.arange(2 * B) % B) + 0.5 * column(sigma_B) * x_BCHW)


def test_teacher_velocity_is_float32_without_gradients() -> None:
    weight = torch.ones((), requires_grad=True)
    teacher = Network(lambda *inputs: (weight * prompted_field(*inputs)).bfloat16())
    u_BCHW = TeacherVelocity(teacher, make_batch(3), GuidanceConfig(scale=2.0))(normal(3, C, H, W), torch.ones(3))
    assert u_BCHW.dtype == torch.float32 and not u_BCHW.requires_grad


# Flow matching.


def flow_matching(B: int, scale: float = 1.0, dropout: float = 0.3, seed: int = 5):
    weight = torch.tensor(0.7, requires_grad=True)
    model = Network(lambda x, sigma, text, mask: weight * x + column(sigma))
    data = DataConfig(root="unused", caption_dropout=dropout)
    config, batch = Config(run_dir="unused", objective="flow_matching", data=data), make_batch(B)
    loss = objectives.flow_matching_step(model, batch, config, SCHEDULE, scale, seeded(seed))
    (call,) = model.calls
    return SimpleNamespace(loss=loss, call=call, weight=weight, batch=batch, model=model)


def noise_in(x_BCHW: Tensor, x0_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """eps of x = (1 - sigma) x_0 + sigma eps, in float64."""
    sigma = column(sigma_B).double()
    return (x_BCHW.double() - (1 - sigma) * x0_BCHW.double()) / sigma


def test_flow_matching_loss_and_gradient() -> None:
    out = flow_matching(B=8, scale=0.25)
    x, x0 = out.call.x.double(), out.batch.x0_BCHW.double()
    error = 0.7 * x + column(out.call.sigma).double() - (noise_in(x, x0, out.call.sigma) - x0)
    assert_close(out.loss.double(), error.square().mean(), rtol=1e-4, atol=0)
    assert not out.loss.requires_grad
    assert out.model.losses == [pytest.approx(0.25 * out.loss.item())]
    assert_close(out.weight.grad.double(), 0.25 * 2 * (x * error).mean(), rtol=1e-4, atol=0)


def test_flow_matching_draws_noise_levels_and_dropped_prompts_independently() -> None:
    B = 4000
    out = flow_matching(B)
    tau_B = SCHEDULE.unwarp(out.call.sigma.double())
    assert tau_B.min() > 0
    expected_B = torch.arange(1, B + 1, dtype=torch.float64) / B
    assert (tau_B.sort()[0] - expected_B).abs().max() < 1.9 / B**0.5  # Kolmogorov's bound at 0.1 %
    noise = noise_in(out.call.x, out.batch.x0_BCHW, out.call.sigma)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert noise.square().mean().item() == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5)
    together = torch.stack([noise.mean((1, 2, 3)), tau_B, out.batch.x0_BCHW.double().mean((1, 2, 3))])
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 4 / B**0.5
    empty_BL = torch.arange(L).expand(B, L) < 2
    dropped_B = tone(out.call.text, out.call.mask) == EMPTY_TONE
    assert torch.equal(out.call.mask[dropped_B], empty_BL[dropped_B])
    assert torch.equal(out.call.mask[~dropped_B], out.batch.mask_BL[~dropped_B])
    assert torch.equal(out.call.text[~dropped_B], out.batch.text_BLD[~dropped_B])
    assert dropped_B.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / B) ** 0.5)
    spread = (1 / 12 / B) ** 0.5
    assert tau_B[dropped_B].mean().item() == pytest.approx(0.5, abs=4 * spread / 0.3**0.5)
    assert not (tone(*[getattr(flow_matching(64, dropout=0.0).call, k) for k in ("text", "mask")]) < 0).any()


# Imitation. A DX policy whose nodes are all v walks a straight line with velocity v, whatever the substeps.


def straight_student(seed: int = 3) -> tuple[Tensor, Network]:
    v_CHW = normal(C, H, W, seed=seed).requires_grad_()
    return v_CHW, Network(lambda x, *_: {"out": v_CHW.expand(len(x), 3, C, H, W)})


def toned_teacher() -> Network:
    return Network(lambda x, sigma, text, mask: column(tone(text, mask)).expand_as(x))


def guided_tones(B: int) -> Tensor:
    tones = torch.arange(B)
    return column(tones + (GUIDANCE - 1) * (tones - EMPTY_TONE)).double()


def assert_straight_loss(loss: Tensor, v_CHW: Tensor, B: int, scale: float) -> None:
    error = v_CHW.detach().double() - guided_tones(B)
    assert_close(loss.double(), LOSS_SCALE / 2 * error.square().mean(), rtol=1e-4, atol=0)
    assert_close(v_CHW.grad.double(), scale * LOSS_SCALE * error.sum(0) / error.numel(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stack", [True, False])
def test_imitation_on_data(stack: bool) -> None:
    """Loss, gradient, sources at the segments' starts in proportion to their lengths, states on the way to their ends."""
    B, M, config, teacher = 350, 2, distillation(stack_teacher_states=stack), toned_teacher()
    batch, (v_CHW, student) = make_batch(B), straight_student()
    loss = objectives.imitation_data_step(student, teacher, batch, config, SCHEDULE, 0, 0.25, seeded())
    assert_straight_loss(loss, v_CHW, B, 0.25)
    assert student.losses == [pytest.approx(0.25 * loss.item(), rel=1e-5)] and not loss.requires_grad
    (call,) = student.calls
    assert torch.equal(call.text, batch.text_BLD) and torch.equal(call.mask, batch.mask_BL) and call.guidance is None
    segment_B = (column(call.sigma).flatten(1) - SCHEDULE.warp(TAUS[:-1])).abs().argmin(1)
    assert_close(call.sigma, SCHEDULE.warp(TAUS[segment_B]))
    for segment, share in enumerate((2 / 7, 2 / 7, 2 / 7, 1 / 7)):
        assert (segment_B == segment).float().mean().item() == pytest.approx(share, abs=4 * (share / B) ** 0.5)
    noise = noise_in(call.x, batch.x0_BCHW, call.sigma)
    assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)
    assert len(teacher.calls) == (1 if stack else M)
    for state in teacher.calls:
        for x, sigma in zip(state.x.split(B), state.sigma.split(B), strict=True):
            assert_close(x, call.x + column(sigma - call.sigma) * v_CHW.detach(), rtol=0, atol=1e-5)
            assert (sigma <= call.sigma + 1e-6).all() and (sigma > SCHEDULE.warp(TAUS[segment_B + 1])).all()


def test_scheduled_mixing_follows_the_teacher_at_first_and_the_policy_at_last() -> None:
    config, B = distillation(num_decay_iters=10), 6
    assert [objectives.teacher_ratio(step, config) for step in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
    assert objectives.teacher_ratio(0, distillation()) == 0.0
    for step, slope in ((0, guided_tones(B).float()), (10, straight_student()[0].detach())):
        teacher, (_, student) = toned_teacher(), straight_student()
        objectives.imitation_data_step(student, teacher, make_batch(B), config, SCHEDULE, step, 1.0, seeded())
        source, x, sigma = student.calls[0], teacher.calls[-1].x[-2 * B :][:B], teacher.calls[-1].sigma[-2 * B :][:B]
        assert (source.sigma - sigma).max() > 0.01
        assert_close(x, source.x + column(sigma - source.sigma) * slope, rtol=0, atol=1e-4)
