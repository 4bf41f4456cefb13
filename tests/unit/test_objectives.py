"""distill/objectives.py: the teacher's velocity, flow matching, segments, and the same noise whatever the split.

test_objectives_imitation.py has the imitation steps. B batch, C latent channels, H W latent size, L text tokens.
"""

from types import SimpleNamespace

import pytest
import torch
from closed_form import EMPTY_TONE, SCHEDULE, C, H, L, Network, W, column, make_batch, noise_in, normal, seeded, tone
from torch.testing import assert_close

from piflow_dist.config import Config, DataConfig, DistillConfig, GuidanceConfig, ScheduleConfig, TrainConfig
from piflow_dist.distill import objectives
from piflow_dist.distill.diagnostics import StepMeter
from piflow_dist.distill.objectives import TeacherVelocity
from piflow_dist.tracking.gauges import PhaseClock

# The teacher.

GUIDANCES = {
    "none": GuidanceConfig(scale=1.0),
    "plain": GuidanceConfig(scale=2.5),
    "interval": GuidanceConfig(scale=2.5, interval=[0.3, 0.7]),
    "orthogonal": GuidanceConfig(scale=2.5, orthogonal=0.5),
}


def prompted_field(x, sigma, text, mask):
    return column(tone(text, mask)) + 0.5 * column(sigma) * x


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


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_teacher_velocity_is_float32_without_gradients(scale: float) -> None:
    weight = torch.ones((), requires_grad=True)
    teacher = Network(lambda *inputs: (weight * prompted_field(*inputs)).bfloat16())
    u_BCHW = TeacherVelocity(teacher, make_batch(3), GuidanceConfig(scale=scale))(normal(3, C, H, W), torch.ones(3))
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


# Where segments and noise come from.


@pytest.mark.parametrize("nfe, last, base", [(4, 0.5, 2 / 7), (2, 1.0, 0.5), (1, 0.5, 2.0)])
def test_segments_of_a_configuration(nfe: int, last: float, base: float) -> None:
    distill = DistillConfig(teacher="unused", nfe=nfe, final_step_size_scale=last)
    config = Config(run_dir="unused", distill=distill, data=DataConfig(root="unused"))
    assert objectives.base_segment(config) == pytest.approx(base)
    lengths = -objectives.segment_boundaries(config, SCHEDULE).diff()
    assert lengths.tolist() == pytest.approx([base] * (nfe - 1) + [base * last])


def test_schedule_of_a_configuration() -> None:
    assert objectives.build_schedule(ScheduleConfig(shift=2.5), (16, 8, 8)).shift == 2.5
    for size, log_shift in (((16, 32, 32), 0.5), ((16, 64, 256), 1.15)):  # 256 and 4,096 tokens of 2 x 2
        schedule = objectives.build_schedule(ScheduleConfig(shift=2.5, dynamic=True), size)
        assert schedule.shift == pytest.approx(torch.tensor(log_shift).exp().item())


def test_flow_matching_takes_its_noise_from_the_generator() -> None:
    drawn = []
    for seed, global_seed in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(global_seed)
        call = flow_matching(8, seed=seed).call
        drawn.append([call.x, call.sigma, call.text])
    first, again, other = drawn
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_image_gets_the_same_noise_whatever_the_split(tiny_data, monkeypatch) -> None:
    """A global batch of 8 in micro-batches of 2 on 1, 2 and 4 processes; train_step seeds, the real stream serves."""
    from data_pipeline.stream import LatentStream
    from piflow_dist import train
    from piflow_dist.launch.straggler import StragglerProbe
    from piflow_dist.launch.watchdog import UNWATCHED

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
            topology=SimpleNamespace(dp_size=dp_size, dp_rank=dp_rank, world_size=dp_size, device=torch.device("cpu")),
            stream=LatentStream(tiny_data, "train", **options),
            model=SimpleNamespace(step=lambda lr_scale, clip: None),
            state=train.TrainState(),
            empty_LD=torch.zeros(1, 64),
            watchdog=UNWATCHED,
            straggler=StragglerProbe(torch.device("cpu"), every=10),
            gauges=SimpleNamespace(meter=StepMeter(torch.device("cpu"), 0, 1.0), clock=PhaseClock(torch.device("cpu"))),
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
