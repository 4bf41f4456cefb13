"""policies/mean.py, and the network that predicts it: told how long the step is, and the teacher at first."""

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.config import LoraConfig, ModelConfig, PolicyConfig
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import policy_sample
from piflow_dist.models.architecture import build_student, build_teacher, plan_tied
from piflow_dist.models.weights import TensorWeights, fill
from piflow_dist.policies import MeanPolicy, rollout

MODEL = ModelConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=24, axes_dims_rope=[4, 6, 6]
)
SCHEDULE = FlowSchedule(3.2)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_rollout_is_one_euler_step_in_sigma() -> None:
    x, mean = normal(3, 2, 2, 2, seed=1), normal(3, 2, 2, 2, seed=2).requires_grad_()
    start, end = torch.tensor([1.0, 0.7, 0.4]), torch.tensor([0.5, 0.0, 0.4])  # the last one stays where it is
    policy = MeanPolicy(mean, x, SCHEDULE.warp(start))
    for substeps in (1, 128):
        found, sigma = rollout(policy, x, start, end, SCHEDULE, substeps)
        assert_close(sigma, SCHEDULE.warp(end))
        assert_close(found, x + (SCHEDULE.warp(end) - SCHEDULE.warp(start))[:, None, None, None] * mean)
    found.sum().backward()
    assert mean.grad.abs().sum() > 0 and not policy.detach().mean.requires_grad
    assert policy.velocity(x, 0.2) is policy.mean


def test_what_cannot_be() -> None:
    x = normal(1, 2, 2, 2, seed=1)
    with pytest.raises(ValueError, match="does not fit x_src"):
        MeanPolicy(x[:, :1], x, 1.0)
    with pytest.raises(ValueError, match="Set temperature to 1"):
        MeanPolicy(x, x, 1.0).with_temperature(0.3)


def test_the_sampler_says_where_each_step_ends() -> None:
    """Also where noise is added between the steps (h > 0): the step then goes further down than the next one begins."""
    for h, reached in ((0.0, [0.5, 0.0]), (float("inf"), [0.0, 0.0])):
        asked = []

        def predict(x, sigma, tau, end, asked=asked):
            asked.append((sigma[0].item(), end[0].item()))
            return MeanPolicy(torch.zeros_like(x), x, sigma)

        policy_sample(
            predict, normal(2, 2, 2, 2, seed=3), FlowSchedule(1.0), 2, final_step_size_scale=1.0, h=h, with_end=True
        )
        assert asked == [(1.0, reached[0]), (0.5, reached[1])]


def inputs() -> tuple[torch.Tensor, ...]:
    return normal(3, 16, 4, 4, seed=4), torch.tensor([1.0, 0.6, 0.2]), normal(3, 5, 24, seed=5), torch.ones(3, 5).bool()


@torch.no_grad()
def test_a_student_starts_as_its_teacher_and_then_heeds_the_length() -> None:
    teacher = build_teacher(MODEL, seed=0)
    for place, parameter in enumerate(teacher.parameters()):
        parameter.copy_(0.2 * normal(*parameter.shape, seed=10 + place))
    student, want = build_student(teacher, MODEL, PolicyConfig(type="mean"), seed=0), teacher(*inputs())
    for span in (torch.zeros(3), torch.tensor([1.0, 0.6, 0.1])):
        assert_close(student(*inputs(), None, span)["mean"], want)
    student.span_embedder.linear_2.weight.copy_(normal(32, 32, seed=6))
    short, long = (student(*inputs(), None, torch.full((3,), span))["mean"] for span in (0.0, 0.2))
    assert (short - long).abs().max() > 1e-3

    source = TensorWeights(teacher.state_dict(), "the teacher")
    tied, start = plan_tied(MODEL, PolicyConfig(type="mean"), LoraConfig(rank=2), source, seed=0)
    fill(tied, start)
    assert_close(tied.eval()(*inputs(), None, torch.full((3,), 0.1))["mean"], want)
    assert_close(tied(*inputs(), adapted=False), want)
    trained = {name.split(".lora_")[0] for name, p in tied.named_parameters() if p.requires_grad}
    assert {f"span_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")} < trained
    for model, span, said in ((student, None, "span_B is missing"), (teacher, torch.zeros(3), "span_B is given")):
        with pytest.raises(ValueError, match=said):
            model(*inputs(), None, span)
    with pytest.raises(ValueError, match="span_B is given"):  # a teacher's pass
        tied(*inputs(), None, torch.zeros(3), adapted=False)
