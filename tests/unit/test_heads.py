"""Output heads: patch order, and what a student is before its first step."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.config import ModelConfig, PolicyConfig
from piflow_dist.models.architecture import build_student, build_teacher
from piflow_dist.models.heads import make_policy, pack, unpack
from piflow_dist.models.qwen_image import QwenImage

B, C, H, W, L, D = 3, 16, 6, 4, 5, 24
MODEL = ModelConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=D, axes_dims_rope=[4, 6, 6]
)
GM = PolicyConfig(num_components=8, logstd_inner_dim=32)
DX_GRID = PolicyConfig(type="dx", num_nodes=5)
DX_POLYNOMIAL = PolicyConfig(type="dx", num_nodes=5, mode="polynomial")


def test_unpack_undoes_pack() -> None:
    x_BCHW = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(0))
    tokens_BTE = pack(x_BCHW)
    assert tokens_BTE.shape == (B, H * W // 4, 4 * C)
    assert torch.equal(unpack(tokens_BTE, (H, W), 1)[:, 0], x_BCHW)


def test_groups_of_channels_are_unpacked_one_after_the_other() -> None:
    """A projection repeated K times gives K times the same image."""
    groups_BGCHW = torch.randn(B, 3, C, H, W, generator=torch.Generator().manual_seed(0))
    tokens_BTE = torch.cat([pack(group_BCHW) for group_BCHW in groups_BGCHW.unbind(1)], dim=-1)
    assert torch.equal(unpack(tokens_BTE, (H, W), 3), groups_BGCHW)


def test_packing_order_is_that_of_diffusers() -> None:
    from data_pipeline.compat import repair_torchvision

    repair_torchvision()
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage").QwenImagePipeline
    x_BCHW = torch.arange(2 * C * H * W, dtype=torch.float32).reshape(2, C, H, W)
    theirs_BTE = pipeline._pack_latents(x_BCHW[:, None], 2, C, H, W)
    assert torch.equal(pack(x_BCHW), theirs_BTE)
    theirs_BC1HW = pipeline._unpack_latents(theirs_BTE, height=8 * H, width=8 * W, vae_scale_factor=8)
    assert torch.equal(unpack(theirs_BTE, (H, W), 1)[:, 0], theirs_BC1HW[:, :, 0])


@pytest.mark.parametrize("size", [(5, 4), (4, 5)])
def test_odd_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="Use an even size"):
        pack(torch.zeros(1, C, *size))


def trained_teacher() -> QwenImage:
    """A teacher whose velocity is not zero: every weight random."""
    teacher = build_teacher(MODEL, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return teacher


@pytest.fixture(scope="module")
def inputs() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(2)
    return SimpleNamespace(
        x_BCHW=torch.randn(B, C, H, W, generator=generator),
        sigma_B=torch.tensor([1.0, 0.6, 0.05]),
        text_BLD=torch.randn(B, L, D, generator=generator),
        mask_BL=torch.tensor([[True] * L, [True] * 3 + [False] * 2, [True] + [False] * (L - 1)]),
    )


def outputs_of(student: QwenImage, inputs: SimpleNamespace) -> dict[str, torch.Tensor]:
    return student(inputs.x_BCHW, inputs.sigma_B, inputs.text_BLD, inputs.mask_BL)


@torch.no_grad()
def velocity_at_source(student: QwenImage, config: PolicyConfig, inputs: SimpleNamespace) -> torch.Tensor:
    policy = make_policy(outputs_of(student, inputs), inputs.x_BCHW, inputs.sigma_B, config, 0.4, shift=3.2)
    return policy.velocity(inputs.x_BCHW, inputs.sigma_B)


@torch.no_grad()
def test_an_untrained_dx_student_has_the_teachers_velocity(inputs: SimpleNamespace) -> None:
    """u = (x - x_0) / sigma of x_0 = x - sigma u loses digits where sigma is small, hence 1e-5."""
    teacher = trained_teacher()
    want_BCHW = teacher(inputs.x_BCHW, inputs.sigma_B, inputs.text_BLD, inputs.mask_BL)
    assert want_BCHW.std() > 0.1
    student = build_student(teacher, MODEL, DX_GRID, seed=0)
    assert_close(velocity_at_source(student, DX_GRID, inputs), want_BCHW, rtol=0, atol=1e-5)
    outputs = outputs_of(student, inputs)["out"]
    assert all(torch.equal(outputs[:, node], outputs[:, 0]) for node in range(5))


@torch.no_grad()
def test_an_untrained_dx_polynomial_has_the_teachers_velocity_at_its_source(inputs: SimpleNamespace) -> None:
    teacher = trained_teacher()
    want_BCHW = teacher(inputs.x_BCHW, inputs.sigma_B, inputs.text_BLD, inputs.mask_BL)
    student = build_student(teacher, MODEL, DX_POLYNOMIAL, seed=0)
    assert_close(velocity_at_source(student, DX_POLYNOMIAL, inputs), want_BCHW, rtol=0, atol=1e-5)


@torch.no_grad()
def test_gm_means_are_the_teachers_velocity_and_bias_noise(inputs: SimpleNamespace) -> None:
    """Every component is off by the noise of its bias: the same for all images, tokens and noise levels, deviation 0.05."""
    teacher = trained_teacher()
    want_BCHW = teacher(inputs.x_BCHW, inputs.sigma_B, inputs.text_BLD, inputs.mask_BL)
    outputs = outputs_of(build_student(teacher, MODEL, GM, seed=0), inputs)
    off_BKCHW = outputs["means"] - want_BCHW[:, None]
    bias_K1CPP = off_BKCHW[:1, :, :, :2, :2]
    assert_close(off_BKCHW, bias_K1CPP.repeat(B, 1, 1, H // 2, W // 2), rtol=0, atol=1e-5)
    noise = bias_K1CPP.flatten().double()  # 512 numbers: the error of their deviation is 3 %, of their mean 0.002
    assert noise.std().item() == pytest.approx(0.05, rel=0.15)
    assert abs(noise.mean().item()) < 0.01
    components_K = bias_K1CPP[0].flatten(1)
    assert (torch.corrcoef(components_K) - torch.eye(8)).abs().max() < 0.6  # no two components alike


@torch.no_grad()
def test_an_untrained_gm_student_has_the_teachers_velocity_up_to_the_bias_noise(inputs: SimpleNamespace) -> None:
    """At the source the policy's velocity is the mean of K = 8 components: deviation 0.05 / sqrt(8)."""
    teacher = trained_teacher()
    want_BCHW = teacher(inputs.x_BCHW, inputs.sigma_B, inputs.text_BLD, inputs.mask_BL)
    student = build_student(teacher, MODEL, GM, seed=0)
    off_BCHW = velocity_at_source(student, GM, inputs) - want_BCHW
    assert off_BCHW.std().item() == pytest.approx(0.05 / math.sqrt(8), rel=0.3)
    student.head.proj_out_means.bias.copy_(teacher.head.proj_out.bias.repeat(8))
    assert_close(velocity_at_source(student, GM, inputs), want_BCHW, rtol=0, atol=1e-5)


@torch.no_grad()
def test_gm_weights_are_equal_and_the_deviation_is_the_published_one(inputs: SimpleNamespace) -> None:
    outputs = outputs_of(build_student(trained_teacher(), MODEL, GM, seed=0), inputs)
    assert outputs["logweights"].shape == (B, 8, 1, H, W)
    assert_close(outputs["logweights"], torch.full((B, 8, 1, H, W), -math.log(8)))
    assert_close(outputs["logstds"], torch.full((B, 1, 1, 1, 1), math.log(0.05)))


@torch.no_grad()
def test_logweights_stay_normalised_after_training(inputs: SimpleNamespace) -> None:
    student = build_student(trained_teacher(), MODEL, GM, seed=0)
    student.head.proj_out_logweights.weight.normal_(generator=torch.Generator().manual_seed(0))
    logweights_BK1HW = outputs_of(student, inputs)["logweights"]
    assert logweights_BK1HW.std() > 0.1
    assert_close(logweights_BK1HW.exp().sum(dim=1), torch.ones(B, 1, H, W))


def test_the_deviation_does_not_train_the_time_embedding(inputs: SimpleNamespace) -> None:
    student = build_student(trained_teacher(), MODEL, GM, seed=0)
    student.head.proj_out_logstds[3].weight.data.normal_()
    outputs_of(student, inputs)["logstds"].sum().backward()
    assert student.time_text_embed.timestep_embedder.linear_1.weight.grad is None
    assert student.head.proj_out_logstds[1].weight.grad.abs().max() > 0


def test_building_a_model_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    build_student(build_teacher(MODEL, seed=5), MODEL, GM, seed=5)
    assert torch.equal(torch.rand(3), want)
