"""Figures beside the loss (distill/diagnostics.py) against what can be worked out by hand; they leave the step as it is."""

import math

import pytest
import torch
from closed_form import SCHEDULE, C, H, Network, W, make_batch, normal, seeded
from test_objectives_imitation import LOSS_SCALE, distillation, straight_student, toned_teacher
from torch.testing import assert_close

from piflow_dist.config import Config, DataConfig, PolicyConfig
from piflow_dist.distill import diagnostics
from piflow_dist.distill.diagnostics import StepMeter
from piflow_dist.distill.imitation import ImitationOutput
from piflow_dist.distill.objectives import flow_matching_step, imitation_data_step, imitation_datafree_step

B = 16
SEGMENTS = (2 / 7, 2 / 7, 2 / 7, 1 / 7)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics.dist, "all_reduce", lambda tensor: None)


def meter(nfe: int = 4) -> StepMeter:
    return StepMeter(torch.device("cpu"), nfe, LOSS_SCALE)


def run(step, config: Config, found: StepMeter | None, student: Network | None = None) -> float:  # noqa: ANN001
    student = student or straight_student()[1]
    return step(student, toned_teacher(), make_batch(B), config, SCHEDULE, 0, 1.0, seeded(), found).item()


@pytest.mark.parametrize("step", [imitation_data_step, imitation_datafree_step])
def test_the_loss_is_that_of_its_parts(step) -> None:  # noqa: ANN001
    """On data the segments' images, from noise the segments' lengths are the weights; noise levels split the same errors."""
    config, found = distillation(), meter()
    loss = run(step, config, found)
    sums = dict(zip(found.names, found.sums.tolist(), strict=True))
    values = found.read(tp=1)
    parts = [values[f"loss_segment/{i}"] for i in range(1, 5)]
    counts = [sums[f"states/{i}"] for i in range(4)]
    weights = SEGMENTS if step is imitation_datafree_step else [count / sum(counts) for count in counts]
    assert sum(counts) == 2 * B * (4 if step is imitation_datafree_step else 1)
    assert_close(sum(w * part for w, part in zip(weights, parts, strict=True)), loss, rtol=1e-5, atol=0)
    mean = sum(count * part for count, part in zip(counts, parts, strict=True)) / sum(counts)
    by_sigma = [
        (values[f"loss_sigma/{(i + 1) / 10:.1f}"], sums[f"states@{i}"]) for i in range(10) if sums[f"states@{i}"]
    ]
    assert sum(count for _, count in by_sigma) == sum(counts) and len(by_sigma) > 4
    assert_close(sum(value * count for value, count in by_sigma) / sum(counts), mean, rtol=1e-5, atol=0)


def test_the_velocity_error_is_relative_to_the_teachers_norm() -> None:
    """A student that is the teacher has none; one that stands still has one of 1."""
    still = Network(lambda x, *_: {"out": torch.zeros(len(x), 3, C, H, W, requires_grad=True)})
    found = meter()
    batch = make_batch(B)
    config = distillation(window_substeps=0)
    imitation_data_step(still, toned_teacher(), batch, config, SCHEDULE, 0, 1.0, seeded(), found)
    values = found.read(tp=1)
    # u = (x - x_0)/sigma with x_0 = x_s: at the source 0, and 0 all along.
    assert_close(values["velocity_error"], 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("step", [imitation_data_step, imitation_datafree_step])
def test_losses_and_gradients_are_the_same_with_and_without(step) -> None:  # noqa: ANN001
    results = []
    for found in (None, meter()):
        v_CHW, student = straight_student()
        loss = run(step, distillation(), found, student)
        results.append((loss, v_CHW.grad.clone()))
    (loss, grad), (metered, metered_grad) = results
    assert loss == metered and torch.equal(grad, metered_grad)


def test_a_mixture_is_described_by_its_weights() -> None:
    """Two of four components with equal weights at every pixel; logstd as given."""
    weights = torch.tensor([0.5, 0.5, 0, 0]).log()[None, :, None, None, None].expand(B, 4, 1, H, W)
    weights = weights.clamp(min=-50)
    outputs = {"logweights": weights, "logstds": torch.full((B, 1, 1, 1, 1), -2.0)}
    entropy, effective, logstd = (diagnostics.mixture_figures(outputs) / B).tolist()
    assert_close([entropy, effective, logstd], [math.log(2), 2.0, -2.0], rtol=1e-5, atol=1e-5)


def test_a_grid_of_one_velocity_has_no_spread() -> None:
    v = normal(B, 1, C, H, W)
    assert_close(diagnostics.grid_spread_B(v.expand(B, 5, C, H, W)), torch.zeros(B))
    two = torch.cat([v + 3, v - 3], 1)
    assert_close(diagnostics.grid_spread_B(two), torch.full((B,), 3.0))


def test_policies_of_both_kinds_are_described() -> None:
    found = meter()
    run(imitation_data_step, distillation(PolicyConfig(type="dx", num_nodes=3)), found)
    assert found.read(tp=1)["policy/grid_spread"] == 0

    def mixture(x: torch.Tensor, *_: object) -> dict[str, torch.Tensor]:
        means = normal(len(x), 4, C, H, W).requires_grad_()
        return {
            "means": means,
            "logstds": torch.full((len(x), 1, 1, 1, 1), -3.0),
            "logweights": torch.full((len(x), 4, 1, H, W), 0.25).log(),
        }

    run(imitation_data_step, distillation(PolicyConfig(num_components=4)), found, Network(mixture))
    values = found.read(tp=1)
    assert_close(values["policy/entropy"], math.log(4), rtol=1e-5, atol=0)
    assert_close(values["policy/effective_components"], 4.0, rtol=1e-5, atol=0)
    assert values["policy/logstd"] == -3.0 and "policy/grid_spread" not in values


def test_flow_matching_is_split_by_noise_level() -> None:
    config = Config(run_dir="unused", objective="flow_matching", data=DataConfig(root="unused"))
    network = Network(lambda x, *_: torch.zeros_like(x).requires_grad_())
    found = StepMeter(torch.device("cpu"), 0, 2.0)
    loss = flow_matching_step(network, make_batch(B), config, SCHEDULE, 1.0, seeded(), found).item()
    sums = dict(zip(found.names, found.sums.tolist(), strict=True))
    total = sum(sums[f"loss@{i}"] for i in range(10)) / sum(sums[f"states@{i}"] for i in range(10))
    assert_close(total, loss, rtol=1e-5, atol=0)
    values = found.read(tp=1)
    assert all(key.startswith("loss_sigma/") or key == "tokens" for key in values)


def test_tokens_are_counted_without_padding_and_readings_start_anew() -> None:
    found = meter()
    mask_BL = torch.tensor([[True, True, False], [True, False, False]])
    found.add_tokens(2, 64, mask_BL)
    assert found.read(tp=2)["tokens"] == (2 * 64 + 3) / 2
    assert found.read(tp=2)["tokens"] == 0


def test_every_image_counts_for_its_own_segment_and_noise_levels() -> None:
    """Errors of 1, 2 and 3 in the segments 1, 2 and 2 of three images, at two noise levels each."""
    size_B = torch.tensor([1.0, 2.0, 3.0])
    target = size_B.reshape(1, 3, 1, 1, 1).expand(2, 3, C, H, W)
    sigma_MB = torch.tensor([[1.0, 0.55, 0.5], [0.91, 0.1, 0.05]])
    out = ImitationOutput(
        loss=torch.tensor(0.0),
        loss_B=size_B,
        prediction=torch.zeros_like(target),
        target=target,
        sigma_MB=sigma_MB,
        finish=lambda: target[0],
    )
    found = meter()
    found.add_imitation(out, {"out": torch.zeros(3, 2, C, H, W)}, torch.tensor([0, 1, 1]))
    values = found.read(tp=1)
    half = LOSS_SCALE / 2
    segments = {key: value for key, value in values.items() if key.startswith("loss_segment")}
    assert_close(segments, {"loss_segment/1": half * 1.0, "loss_segment/2": half * (4 + 9) / 2})
    by_sigma = {key: value for key, value in values.items() if key.startswith("loss_sigma")}
    wanted = {"1.0": 1.0, "0.6": 4.0, "0.5": 9.0, "0.1": (4 + 9) / 2}
    assert_close(by_sigma, {f"loss_sigma/{name}": half * value for name, value in sorted(wanted.items())})
    assert values["velocity_error_segment/1"] == values["velocity_error"] == 1.0


def test_what_is_not_finite_stays_with_its_segment_and_noise_level() -> None:
    """Of four images, one in each segment and at a noise level of its own, the first one's prediction is not a number."""
    found, prediction = meter(), torch.ones(1, 4, C, H, W)
    prediction[:, 0] = float("nan")
    sigma_MB = torch.tensor([[0.95, 0.75, 0.55, 0.35]])
    out = ImitationOutput(
        loss=torch.tensor(0.0),
        loss_B=torch.zeros(4),
        prediction=prediction,
        target=torch.full_like(prediction, 2.0),
        sigma_MB=sigma_MB,
        finish=lambda: prediction[0],
    )
    found.add_imitation(out, {"out": normal(4, 3, C, H, W)}, torch.arange(4))
    values = found.read(tp=1)
    for name, others in (("loss_segment", (2, 3, 4)), ("loss_sigma", (0.8, 0.6, 0.4))):
        assert [values[f"{name}/{i}"] for i in others] == pytest.approx([LOSS_SCALE / 2] * 3)
    assert math.isnan(values["loss_segment/1"]) and math.isnan(values["loss_sigma/1.0"])
