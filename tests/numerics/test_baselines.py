"""MeanFlow and the regression of end points: the derivative, the identity, and 1-NFE students of all objectives on a known flow.

Float64 but for the trainings. B batch, C channels, H W size (the toy's images are one pixel of two channels), J blobs.
"""

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from piflow_dist.config import (
    Config,
    DataConfig,
    DistillConfig,
    GuidanceConfig,
    MeanFlowConfig,
    ModelConfig,
    PolicyConfig,
)
from piflow_dist.distill.baselines import adaptive_loss, follow_teacher, meanflow_step, meanflow_times, shortcut_step
from piflow_dist.distill.objectives import Batch, base_segment, imitation_data_step, imitation_datafree_step
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import policy_sample
from piflow_dist.models.architecture import build_student, build_teacher
from piflow_dist.models.derivative import forward_derivative
from piflow_dist.models.heads import make_policy

from .mixture_law import three_blobs

F64 = torch.float64


# The derivative.


TRUNK = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24}
MODELS = {
    "qwen_image": ModelConfig(axes_dims_rope=[4, 6, 6], **TRUNK),
    "flux": ModelConfig(
        architecture="flux",
        num_single_layers=2,
        pooled_projection_dim=10,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=True,
        **TRUNK,
    ),
    "dit": ModelConfig(architecture="dit", latent_channels=4, axes_dims_rope=[], time_scale=100.0, **TRUNK),
}


def random_student(config: ModelConfig, dtype: torch.dtype = F64) -> Callable[..., Tensor]:
    """A student of mean velocities with random weights: no path is blocked by zeros of the initialisation."""
    model = build_student(build_teacher(config, seed=0), config, PolicyConfig(type="mean"), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return lambda *inputs: model(*inputs)["mean"]


def inputs_of(config: ModelConfig) -> list[Tensor | None]:
    """x, sigma, prompts (of two lengths behind their mask where there is one), guidance scale, span; and a direction of x."""
    generator = torch.Generator().manual_seed(2)
    x, direction = (torch.randn(3, config.latent_channels, 4, 4, generator=generator, dtype=F64) for _ in range(2))
    text, mask = torch.randn(3, 5, 24, generator=generator, dtype=F64), torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    sigma, span = torch.tensor([0.9, 0.5, 0.3], dtype=F64), torch.tensor([0.9, 0.2, 0.0], dtype=F64)
    scale = torch.full_like(sigma, 3.5) if config.guidance_embeds else None
    return [x, sigma, text, mask if config.architecture == "qwen_image" else None, scale, span, direction]


@pytest.mark.parametrize("architecture", MODELS)
def test_derivative_of_the_transformer_against_finite_differences(architecture: str) -> None:
    """Along x, sigma and the length together, and along each alone."""
    network = random_student(MODELS[architecture])
    x, sigma, text, mask, scale, span, direction = inputs_of(MODELS[architecture])
    one, none, h = torch.ones_like(sigma), torch.zeros_like(sigma), 1e-6
    for along_x, along_sigma, along_span in (
        (direction, one, one),
        (0 * x, one, none),
        (0 * x, none, one),
        (direction, none, none),
    ):
        tangents = (along_x, along_sigma, None, None, None, along_span)
        found = forward_derivative(network, (x, sigma, text, mask, scale, span), tangents)
        with torch.no_grad():
            ends = [
                network(x + step * along_x, sigma + step * along_sigma, text, mask, scale, span + step * along_span)
                for step in (h, -h)
            ]
        want = (ends[0] - ends[1]) / (2 * h)
        assert want.abs().max() > 1e-3
        assert_close(found, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
        assert not found.requires_grad


@pytest.mark.parametrize(("architecture", "rounds"), [("qwen_image", True), ("flux", True), ("dit", False)])
def test_what_bf16_does_to_the_noise_level(architecture: str, rounds: bool) -> None:
    """Qwen-Image and FLUX round it before the sinusoids, as published: the output stands still where the derivative does not."""
    network = random_student(MODELS[architecture], torch.bfloat16)
    x, _, text, mask, scale, span, _ = inputs_of(MODELS[architecture])
    sigma = torch.tensor([0.9, 0.7, 0.6])
    with torch.no_grad():
        here, there = (network(x, sigma + step, text, mask, scale, span) for step in (0, 1e-4))
    assert torch.equal(here, there) == rounds
    none = (None,) * 4
    assert (
        forward_derivative(network, (x, sigma, text, mask, scale, span), (None, torch.ones(3), *none)).abs().max() > 1
    )


# The identity.


class ClosedForm:
    """A network of closed form as the steps see the trained model. Notes the losses' graph by calling backward."""

    def __init__(self, mean: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.mean, self.calls, self.losses = mean, [], []

    def _answer(
        self, x: Tensor, sigma: Tensor, text: Tensor, mask: Tensor, guidance: Tensor | None, span: Tensor
    ) -> Tensor:
        return self.mean(x, sigma[:, None, None, None], span[:, None, None, None])

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.calls.append(SimpleNamespace(x=inputs[0], sigma=inputs[1], span=inputs[5]))
        return {"mean": self._answer(*inputs)}

    def derivative(self, inputs: tuple, tangents: tuple) -> Tensor:
        return forward_derivative(self._answer, inputs, tangents)

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()


def batch_of(x0_BCHW: Tensor) -> Batch:
    B = len(x0_BCHW)
    return Batch(x0_BCHW, torch.zeros(B, 1, 1), torch.ones(B, 1, dtype=torch.bool), torch.zeros(1, 1))


def toy_config(objective: str, policy: str, nfe: int = 1, **distill: object) -> Config:
    return Config(
        run_dir="unused",
        objective=objective,
        policy=PolicyConfig(type=policy, num_components=8, num_nodes=10),
        distill=DistillConfig(
            teacher="unused", nfe=nfe, guidance=GuidanceConfig(scale=1.0), final_step_size_scale=1.0, **distill
        ),
        data=DataConfig(root="unused"),
    )


STD = 0.6
"""Of a Gaussian law, whose flow scales x by q(sigma) = sqrt((1 - sigma)^2 STD^2 + sigma^2)."""


def width(sigma: Tensor) -> Tensor:
    return ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()


def gaussian_velocity(x: Tensor, sigma_B: Tensor, *others: Tensor | None) -> Tensor:
    sigma = sigma_B[:, None, None, None]
    return x * (sigma - (1 - sigma) * STD**2) / width(sigma) ** 2


def test_the_exact_mean_velocity_solves_meanflows_equation() -> None:
    """Of a Gaussian law it is known: u = x (1 - q(r)/q(sigma)) / (sigma - r). Its error is zero, that of the velocity itself is not."""

    def exact(x: Tensor, sigma: Tensor, span: Tensor) -> Tensor:
        safe = span.clamp(min=1e-3)
        return scale * x * (1 - width(sigma - safe) / width(sigma)) / safe

    schedule, errors, scale = FlowSchedule(3.2), [], torch.ones((), requires_grad=True)
    x0 = STD * torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    config = toy_config("meanflow", "mean", meanflow=MeanFlowConfig(instant_share=0.0, weight_power=0.0))
    for mean in (exact, lambda x, sigma, span: scale * gaussian_velocity(x, sigma.flatten())):
        model = ClosedForm(mean)
        errors.append(
            meanflow_step(
                model, gaussian_velocity, batch_of(x0), config, schedule, 1.0, torch.Generator().manual_seed(4)
            )
        )
        assert model.calls[0].span.min() > 1e-3  # where `exact` is not held back
    assert errors[0] < 1e-9 and errors[1] > 1e-2, errors


def test_meanflow_loss_and_gradient_by_hand() -> None:
    """u = w x + a sigma + b span, so du/dsigma = w v + a + b; only the prediction has a gradient, with the adaptive weight held."""
    w = torch.tensor(0.7, requires_grad=True)
    model = ClosedForm(lambda x, sigma, span: w * x + 0.3 * sigma + 0.5 * span)
    x0 = torch.randn(40, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    settings = MeanFlowConfig(velocity="data", instant_share=0.5, weight_power=0.75, weight_constant=0.1)
    config = toy_config("meanflow", "mean", meanflow=settings)
    reported = meanflow_step(
        model, None, batch_of(x0), config, FlowSchedule(2.0), 0.25, torch.Generator().manual_seed(6)
    )
    (call,) = model.calls
    sigma, span = call.sigma[:, None, None, None], call.span[:, None, None, None]
    assert 0.3 < (call.span == 0).double().mean() < 0.7
    v = (call.x - (1 - sigma) * x0) / sigma - x0
    error = 0.7 * call.x + 0.3 * sigma + 0.5 * span - (v - span * (0.7 * v + 0.8))
    size_B = error.square().sum((1, 2, 3))
    assert_close(reported, error.square().mean())
    assert_close(model.losses[0], 0.25 * (size_B / (size_B + 0.1) ** 0.75).mean())
    gradient_B = 2 * (error * call.x).sum((1, 2, 3)) / (size_B + 0.1) ** 0.75
    assert_close(w.grad, 0.25 * gradient_B.mean())


def test_meanflow_times() -> None:
    """Two logit-normal times in tau, sorted; the same in sigma with the mean moved by log shift."""
    settings, schedule, count = (
        MeanFlowConfig(time_mean=-0.4, time_std=1.0, instant_share=0.4),
        FlowSchedule(3.2),
        20_000,
    )
    sigma_B, end_B = meanflow_times(count, settings, schedule, torch.Generator().manual_seed(7))
    apart = end_B < sigma_B
    assert torch.equal(sigma_B[~apart], end_B[~apart])
    assert apart.double().mean().item() == pytest.approx(0.6, abs=4 * (0.24 / count) ** 0.5)
    both = torch.cat([sigma_B, torch.where(apart, end_B, sigma_B)])[torch.cat([apart, apart])].double().logit()
    assert both.mean().item() == pytest.approx(-0.4 + torch.tensor(3.2).log().item(), abs=4 / len(both) ** 0.5)
    assert both.std().item() == pytest.approx(1, abs=0.03)
    again, _ = meanflow_times(count, settings, schedule, torch.Generator().manual_seed(7))
    assert torch.equal(sigma_B, again)


def test_the_adaptive_weight_at_power_one_makes_every_image_count_alike() -> None:
    square = torch.tensor([[1e-1], [1e4]], dtype=F64)[..., None, None].requires_grad_()
    loss = adaptive_loss(square, MeanFlowConfig(weight_constant=1e-9))
    loss.backward()
    assert_close(loss.detach(), torch.ones((), dtype=F64))
    assert_close(square.grad.flatten() * square.detach().flatten(), torch.full((2,), 0.5, dtype=F64))


def test_following_the_teacher_ends_at_the_flow_map() -> None:
    """The Gaussian law's, x_r = x q(r)/q(sigma): Euler's error falls with the number of substeps; each image has its own segment."""
    schedule, x = FlowSchedule(3.2), torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(8), dtype=F64)
    tau, length = torch.tensor([1.0, 0.7, 0.3], dtype=F64), torch.tensor([0.3, 0.4, 0.3], dtype=F64)
    sigma, end = schedule.warp(tau), schedule.warp((tau - length).clamp(min=0))
    want = x * (width(end) / width(sigma))[:, None, None, None]
    errors = [
        (follow_teacher(gaussian_velocity, x, tau, length, schedule, substeps) - want).abs().max().item()
        for substeps in (8, 64, 512)
    ]
    assert errors[2] < 2e-3 and errors[1] / errors[2] > 6 and errors[0] / errors[1] > 4, errors


# 1-NFE students on a mixture of Gaussians, against its exact flow map.

SCHEDULE, LAW = FlowSchedule(1.0), three_blobs()
HIDDEN, BATCH, STEPS = 128, 256, 600


class Student(nn.Module):
    """An MLP of x, sigma and the segment's length with the outputs of a policy head, as the steps see the trained model."""

    def __init__(self, policy: PolicyConfig):
        super().__init__()
        self.policy = policy
        outputs = {"gmflow": policy.num_components * 3 + 1, "dx": policy.num_nodes * 2, "mean": 2}[policy.type]
        sizes = [8, HIDDEN, HIDDEN, HIDDEN]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))

    def forward(self, x, sigma, text=None, mask=None, guidance=None, span=None) -> dict[str, Tensor]:
        span = torch.zeros_like(sigma) if span is None else span
        times = torch.stack(
            [f(torch.pi * t) for t in (sigma, span) for f in (torch.cos, torch.sin)] + [sigma, span], dim=1
        )
        out, B, K = self.net(torch.cat([x.flatten(1), times], dim=1)), len(x), self.policy.num_components
        if self.policy.type == "mean":
            return {"mean": x + out.view(B, 2, 1, 1)}
        if self.policy.type == "dx":
            return {"out": x[:, None] + out.view(B, -1, 2, 1, 1)}
        return {
            "means": x[:, None] + out[:, : 2 * K].view(B, K, 2, 1, 1),
            "logweights": out[:, 2 * K : 3 * K].view(B, K, 1, 1, 1).log_softmax(1),
            "logstds": out[:, 3 * K :].view(B, 1, 1, 1, 1),
        }

    def derivative(self, inputs: tuple, tangents: tuple) -> Tensor:
        return forward_derivative(lambda *values: self(*values)["mean"], inputs, tangents)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def true_velocity(x: Tensor, sigma_B: Tensor, *others: Tensor | None) -> Tensor:
    return LAW.velocity(x, sigma_B)


@functools.cache
def exact_map() -> tuple[Tensor, Tensor]:
    """(noises, where the true flow takes them), by 400 steps of Heun's method in float64."""
    x = noise = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(9), dtype=F64)
    sigmas = torch.linspace(1, 1e-4, 401, dtype=F64)
    for sigma, after in itertools.pairwise(sigmas):
        u = true_velocity(x, sigma.expand(len(x)))
        ahead = true_velocity(x + (after - sigma) * u, after.expand(len(x)))
        x = x + (after - sigma) * (u + ahead) / 2
    return noise, x


OBJECTIVES = {
    "imitation, GM": ("imitation", "gmflow", {"loss_scale": 2.0, "component_dropout": 0.0}),
    "imitation, DX": ("imitation", "dx", {"loss_scale": 2.0}),
    "imitation, no data": ("imitation_datafree", "gmflow", {"loss_scale": 2.0, "component_dropout": 0.0}),
    "meanflow": ("meanflow", "mean", {"meanflow": MeanFlowConfig(instant_share=0.5)}),
    "end points": ("shortcut_regression", "mean", {"loss_scale": 2.0, "teacher_substeps": 16}),
}
BOUNDS = {"imitation, GM": 0.45, "imitation, DX": 0.45, "imitation, no data": 0.45, "meanflow": 0.55, "end points": 0.2}
"""Found: 0.32, 0.33, 0.42, 0.12. One Euler step of the true velocity ends at the mean of the law: 1."""


def train_student(name: str) -> Callable[[Tensor, int], Tensor]:
    """A student after STEPS steps of the real objective, as a sampler: (noise, nfe) -> x_0."""
    objective, policy, changes = OBJECTIVES[name]
    config = toy_config(objective, policy, total_substeps=32, window_substeps=1, **changes)
    torch.manual_seed(10)
    student, generator = Student(config.policy), torch.Generator().manual_seed(11)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        batch = batch_of(LAW.draw(BATCH, generator)[..., None, None].float())
        if objective.startswith("imitation"):
            imitate = imitation_data_step if objective == "imitation" else imitation_datafree_step
            imitate(student, true_velocity, batch, config, SCHEDULE, step, 1.0, generator)
        else:
            take = meanflow_step if objective == "meanflow" else shortcut_step
            take(student, true_velocity, batch, config, SCHEDULE, 1.0, generator)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()

    def predict(x: Tensor, sigma_B: Tensor, tau_B: Tensor, end_B: Tensor) -> object:
        outputs = student(x, sigma_B, span=sigma_B - end_B)
        return make_policy(outputs, x, sigma_B, config.policy, base_segment(config), SCHEDULE.shift)

    return lambda noise, nfe: policy_sample(
        predict, noise.float(), SCHEDULE, nfe, final_step_size_scale=1.0, total_substeps=128, with_end=True
    )


def relative_error(found: Tensor) -> float:
    """Root mean square distance to the exact end points, by the spread of these around their mean."""
    want = exact_map()[1]
    spread = (want - want.mean(0)).square().mean().sqrt()
    return ((found - want).square().mean().sqrt() / spread).item()


@torch.no_grad()
def test_one_euler_step_of_the_true_velocity_is_far_from_the_flow_map() -> None:
    noise = exact_map()[0]
    assert relative_error(noise - true_velocity(noise, torch.ones(len(noise), dtype=F64))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_students_follow_the_exact_flow_map(name: str) -> None:
    sample, noise = train_student(name), exact_map()[0]
    with torch.no_grad():
        error = relative_error(sample(noise, 1))
        assert error < BOUNDS[name], error
        if name == "meanflow":  # one training for every number of steps
            assert relative_error(sample(noise, 4)) < min(0.3, 0.7 * error)
