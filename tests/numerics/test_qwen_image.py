"""models/qwen_image.py against diffusers' QwenImageTransformer2DModel on the same weights: outputs and all gradients."""

import pytest
import torch
from torch.testing import assert_close

from data_pipeline.compat import repair_torchvision
from piflow_dist.config import ModelConfig
from piflow_dist.models.heads import VelocityHead, pack
from piflow_dist.models.qwen_image import QwenImage

repair_torchvision()
from diffusers import QwenImageTransformer2DModel  # noqa: E402  (imports torchvision)

CONFIG = ModelConfig(
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=24,
    latent_channels=16,
    joint_attention_dim=40,
    axes_dims_rope=[8, 8, 8],
)


def build_pair(dtype: torch.dtype) -> tuple[QwenImage, QwenImageTransformer2DModel]:
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=3, attention_head_dim=24, num_attention_heads=4,
        joint_attention_dim=40, axes_dims_rope=(8, 8, 8),
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name and parameter.dim() == 1 and "linear" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # norms start at one: a swapped pair would not show
    ours = QwenImage(CONFIG, VelocityHead(CONFIG.width, 16)).to(dtype)
    state = {name.replace("proj_out.", "head.proj_out."): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours, theirs


def unpack_reference(tokens, height, width):
    """Token (i, j) holds (C, 2, 2) of the patch there."""
    out = torch.empty(len(tokens), 16, height, width, dtype=tokens.dtype)
    for i in range(height // 2):
        for j in range(width // 2):
            patch = tokens[:, i * (width // 2) + j].reshape(-1, 16, 2, 2)
            out[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch
    return out


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (14, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_diffusers(size, masked):
    ours, theirs = build_pair(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, *size, generator=generator)
    text = torch.randn(3, 5, 40, generator=generator)
    sigma = torch.tensor([0.03, 0.5, 1.0])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool() if masked else None
    weight = torch.randn(3, 16, *size, generator=generator)

    x_ours, text_ours = x.clone().requires_grad_(), text.clone().requires_grad_()
    out = ours(x_ours, sigma, text_ours, mask)
    (out * weight).sum().backward()

    x_theirs, text_theirs = x.clone().requires_grad_(), text.clone().requires_grad_()
    tokens = theirs(
        hidden_states=pack(x_theirs), encoder_hidden_states=text_theirs, encoder_hidden_states_mask=mask,
        timestep=sigma, img_shapes=[(1, size[0] // 2, size[1] // 2)] * 3, return_dict=False,
    )[0]  # fmt: skip
    want = unpack_reference(tokens, *size)
    (want * weight).sum().backward()

    assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-4)
    assert_close(text_ours.grad, text_theirs.grad, rtol=1e-4, atol=1e-4)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        mine = gradients[name.replace("proj_out.", "head.proj_out.")]
        unused = "transformer_blocks.2" in name and ("to_add_out" in name or "txt_mlp" in name)
        if unused:
            assert mine is None and (parameter.grad is None or not parameter.grad.any()), name
        else:
            scale = parameter.grad.abs().max().item()
            assert_close(mine, parameter.grad, rtol=1e-4, atol=2e-5 * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [False, True])
def test_matches_diffusers_in_bfloat16(masked):
    """Outputs and all gradients, each within 3 % of its own norm: one bf16 operation rounds to 0.4 %."""
    ours, theirs = build_pair(torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 8, 6, generator=generator).bfloat16()
    text = torch.randn(2, 4, 40, generator=generator).bfloat16()
    sigma = torch.tensor([0.25, 0.9])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool() if masked else None
    weight = torch.randn(2, 16, 8, 6, generator=generator)

    x_ours, text_ours = x.clone().requires_grad_(), text.clone().requires_grad_()
    mine = ours(x_ours, sigma, text_ours, mask)
    (mine.float() * weight).sum().backward()
    x_theirs, text_theirs = x.clone().requires_grad_(), text.clone().requires_grad_()
    tokens = theirs(
        hidden_states=pack(x_theirs), encoder_hidden_states=text_theirs, encoder_hidden_states_mask=mask, timestep=sigma,
        img_shapes=[(1, 4, 3)] * 2, return_dict=False,
    )[0]  # fmt: skip
    want = unpack_reference(tokens, 8, 6)
    (want.float() * weight).sum().backward()

    assert mine.dtype == torch.bfloat16
    pairs = {"output": (mine, want), "x": (x_ours.grad, x_theirs.grad), "text": (text_ours.grad, text_theirs.grad)}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            pairs[name] = gradients[name.replace("proj_out.", "head.proj_out.")], parameter.grad
    assert len(pairs) > 80
    for name, (found, wanted) in pairs.items():
        off = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
        assert off < 0.03, f"{name}: off by {off:.1%}"
