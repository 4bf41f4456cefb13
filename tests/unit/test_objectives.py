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
    """Prompts of 1 to L tokens that all hold the prompt's tone, 0 to 4; 99 where the mask is off."""
    mask_BL = torch.arange(L) <= torch.arange(B)[:, None] % L
    text_BLD = torch.where(mask_BL[..., None], tones(B)[:, None, None], 99.0).expand(B, L, D)
    return Batch(normal(B, C, H, W, seed=1) + 2, text_BLD, mask_BL, torch.full((empty_tokens, D), EMPTY_TONE))


def tones(B: int) -> Tensor:
    return torch.arange(B) % 5 / 1.0


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


def from_noise(config: Config, student: Network, batch: Batch, scale: float = 1.0, seed: int = 5):
    teacher = toned_teacher()
    loss = objectives.imitation_datafree_step(student, teacher, batch, config, SCHEDULE, scale, seeded(seed))
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
        return make_policy(bent_outputs(kind, x, sigma), x, sigma, policy, 2 / 7, SHIFT)

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


# Where segments and noise come from.


@pytest.mark.parametrize("nfe, last, base", [(4, 0.5, 2 / 7), (2, 1.0, 0.5), (1, 0.5, 2.0)])
def test_segments_of_a_configuration(nfe: int, last: float, base: float) -> None:
    config = distillation(nfe=nfe, final_step_size_scale=last)
    assert objectives.base_segment(config) == pytest.approx(base)
    lengths = -objectives.segment_boundaries(config, SCHEDULE).diff()
    assert lengths.tolist() == pytest.approx([base] * (nfe - 1) + [base * last])


def test_schedule_of_a_configuration() -> None:
    assert objectives.build_schedule(ScheduleConfig(shift=2.5), (16, 8, 8)).shift == 2.5
    for size, log_shift in (((16, 32, 32), 0.5), ((16, 64, 256), 1.15)):  # 256 and 4,096 tokens of 2 x 2
        schedule = objectives.build_schedule(ScheduleConfig(shift=2.5, dynamic=True), size)
        assert schedule.shift == pytest.approx(torch.tensor(log_shift).exp().item())


@pytest.mark.parametrize("step", [on_data, from_noise, None])
def test_all_noise_comes_from_the_generator(step) -> None:
    def drawn(seed: int, global_seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        if step is None:
            return [(out := flow_matching(8, seed=seed)).loss, out.call.x, out.call.sigma, out.call.text]
        loss, teacher = step(distillation(), student := straight_student()[1], make_batch(8), seed=seed)
        return [loss, *(value for call in (*student.calls, *teacher.calls) for value in (call.x, call.sigma))]

    first, again, other = drawn(1, 1), drawn(1, 2), drawn(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_an_image_gets_the_same_noise_whatever_the_split(tiny_data, monkeypatch) -> None:
    """A global batch of 8 in micro-batches of 2 on 1, 2 and 4 processes; train_step seeds, the real stream serves."""
    from data_pipeline.stream import LatentStream
    from piflow_dist import train

    def draws(dp_size: int, dp_rank: int, seed: int = 7) -> dict[tuple[int, bytes], tuple[bytes, float]]:
        """(step, images) -> (the generator's noise, torch's own), of three steps."""
        found, losses = {}, []

        def micro_step(run, batch, scale, generator):
            assert scale == 2 * dp_size / 8
            noise = torch.randn(4, generator=generator).numpy().tobytes()
            found[run.state.step, batch.x0_BCHW.numpy().tobytes()] = noise, torch.rand(()).item()
            losses.append(batch.x0_BCHW.mean())
            return losses[-1]

        monkeypatch.setattr(train, "micro_step", micro_step)
        options = {"batch_size": 2, "seed": 3, "dp_rank": dp_rank, "dp_size": dp_size, "global_batch": 8}
        run = SimpleNamespace(
            config=Config(
                run_dir="unused",
                objective="flow_matching",
                data=DataConfig(root="unused"),
                train=TrainConfig(batch_size=8, micro_batch_size=2, seed=seed),
            ),
            topology=SimpleNamespace(dp_size=dp_size, dp_rank=dp_rank, device=torch.device("cpu")),
            stream=LatentStream(tiny_data, "train", **options),
            model=SimpleNamespace(step=lambda lr_scale, clip: None),
            state=train.TrainState(),
            empty_LD=torch.zeros(1, 64),
        )
        for run.state.step in range(3):
            losses.clear()
            loss, _ = train.train_step(run)
            assert_close(loss, torch.stack(losses).mean() / dp_size)  # all_reduce adds the other ranks' shares
        return found

    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: None)
    whole = draws(1, 0)
    assert len(whole) == 12 == len(set(whole.values()))
    for dp_size in (2, 4):
        parts = [draws(dp_size, rank) for rank in range(dp_size)]
        assert {place: noise for part in parts for place, noise in part.items()} == whole
    assert not set(draws(1, 0, seed=8).values()) & set(whole.values())
