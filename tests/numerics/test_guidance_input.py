"""Guidance-distilled teachers: the scale is an input of the network, embedded as in FLUX.1-dev."""

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.config import ConfigError, GuidanceConfig, ModelConfig, PolicyConfig, load_config
from piflow_dist.distill.objectives import Batch, TeacherVelocity
from piflow_dist.models.architecture import build_student, build_teacher
from piflow_dist.models.qwen_image import QwenImage, TimestepEmbedder

B, L, D = 3, 5, 24
MODEL = ModelConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    joint_attention_dim=D,
    axes_dims_rope=[4, 6, 6],
    guidance_embeds=True,
)


def randomised(model: QwenImage, seed: int) -> QwenImage:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(5)
    x_BCHW = torch.randn(B, 16, 4, 4, generator=generator)
    text_BLD = torch.randn(B, L, D, generator=generator)
    batch = Batch(x_BCHW, text_BLD, torch.ones(B, L, dtype=torch.bool), torch.randn(1, D, generator=generator))
    return x_BCHW, torch.tensor([0.2, 0.6, 1.0]), batch


def test_embedding_equals_that_of_diffusers() -> None:
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings

    torch.manual_seed(0)
    theirs = CombinedTimestepGuidanceTextProjEmbeddings(32, 8)
    ours = TimestepEmbedder(32, guidance_embeds=True)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("text_embedder")})
    sigma_B, guidance_B, pooled = torch.tensor([0.0, 0.31, 1.0]), torch.tensor([1.0, 3.5, 7.0]), torch.randn(3, 8)
    want = theirs(1000 * sigma_B, 1000 * guidance_B, pooled) - theirs.text_embedder(pooled)
    assert_close(ours(sigma_B, guidance_B, torch.float32), want, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_evaluated_once_with_the_scale() -> None:
    model, (x_BCHW, sigma_B, batch) = randomised(build_teacher(MODEL, seed=0), 1), inputs()
    calls = []

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return model(*arguments)

    velocity = TeacherVelocity(counted, batch, GuidanceConfig(scale=3.5), embedded=True)
    u_BCHW = velocity(x_BCHW, sigma_B)
    assert len(calls) == 1 and len(calls[0][0]) == B
    want = model(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL, torch.full((B,), 3.5))
    assert torch.equal(u_BCHW, want)
    other = TeacherVelocity(model, batch, GuidanceConfig(scale=5.0), embedded=True)(x_BCHW, sigma_B)
    assert (other - u_BCHW).abs().max() > 1e-3


def test_the_student_keeps_the_teachers_input_and_learns_through_it() -> None:
    teacher, (x_BCHW, sigma_B, batch) = randomised(build_teacher(MODEL, seed=0), 1), inputs()
    student = build_student(teacher, MODEL, PolicyConfig(num_components=2, logstd_inner_dim=16), seed=0)
    outputs = student(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL, torch.full((B,), 3.5))
    outputs["means"].square().sum().backward()
    assert student.time_text_embed.guidance_embedder.linear_1.weight.grad.abs().sum() > 0


def test_scale_and_model_must_agree() -> None:
    x_BCHW, sigma_B, batch = inputs()
    with pytest.raises(ValueError, match="guidance_B is missing"):
        build_teacher(MODEL, seed=0)(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=flow_matching", "data.root=x"], "model.guidance_embeds=false"),
        (["distill.teacher=t", "data.root=x", "distill.guidance.orthogonal=0.5"], "distill.guidance.orthogonal=0"),
        (["distill.teacher=t", "data.root=x", "distill.guidance.interval=[0.2,1]"], "distill.guidance.interval=[0,1]"),
    ],
)
def test_impossible_combinations(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["run_dir=r", "model.guidance_embeds=true", *overrides])
    assert message in str(error.value)
