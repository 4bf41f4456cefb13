"""Qwen-Image's MMDiT as one plain module: latent in, velocity or policy parameters out.

The layers are diffusers' own, so that names and arithmetic are those of the published checkpoints. The forward pass over
them is ours: it ends in a head of `heads.py` (which a teacher and its students do not share) that also sees the time
embedding, and it calls the blocks the way DeepSpeed wants. A test compares it with diffusers' forward.
"""

import torch
from torch import Tensor, nn

from data_pipeline.compat import repair_torchvision
from piflow_dist.config import ModelConfig, PolicyConfig
from piflow_dist.models.heads import PATCH, VelocityHead, build_policy_head, pack

repair_torchvision()
from diffusers import QwenImageTransformer2DModel  # noqa: E402  (imports torchvision)
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock  # noqa: E402


class QwenImage(nn.Module):
    """forward(x_BCHW, sigma_B, text_BLD, mask_BL) -> what the head returns.

    leaf_modules: what a sharding engine should gather as one piece.
    sigma is the noise level in [0, 1] (diffusers' timestep / 1000); mask is boolean over the padded text.
    """

    leaf_modules = (QwenImageTransformerBlock,)

    def __init__(self, config: ModelConfig, head: nn.Module):
        super().__init__()
        self.transformer = QwenImageTransformer2DModel(
            patch_size=PATCH,
            in_channels=config.latent_channels * PATCH * PATCH,
            out_channels=config.latent_channels,
            num_layers=config.num_layers,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            joint_attention_dim=config.joint_attention_dim,
            axes_dims_rope=tuple(config.axes_dims_rope),
        )
        self.transformer.proj_out = nn.Identity()
        self.head = head
        # Nothing reads the text tokens that leave the last block, so these never get a gradient.
        last = self.transformer.transformer_blocks[-1]
        for unused in (last.attn.to_add_out, last.txt_mlp):
            unused.requires_grad_(False)

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, mask_BL: Tensor | None):
        trunk, (H, W) = self.transformer, x_BCHW.shape[-2:]
        dtype = trunk.img_in.weight.dtype
        image_BTD = trunk.img_in(pack(x_BCHW.to(dtype)))
        text_BLD = trunk.txt_in(trunk.txt_norm(text_BLD.to(dtype)))
        temb_BD = trunk.time_text_embed(sigma_B.to(dtype), image_BTD)
        rope = trunk.pos_embed(
            [(1, H // PATCH, W // PATCH)], max_txt_seq_len=text_BLD.shape[1], device=image_BTD.device
        )
        for block in trunk.transformer_blocks:
            # Positional: DeepSpeed's hooks on whole blocks do not see keyword arguments, and free their weights too early.
            text_BLD, image_BTD = block(image_BTD, text_BLD, mask_BL, temb_BD, rope)
        return self.head(trunk.norm_out(image_BTD, temb_BD), temb_BD, (H, W))


def build_teacher(config: ModelConfig, seed: int) -> QwenImage:
    """A randomly initialised teacher that starts as the zero velocity field: modulations and output projection are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QwenImage(config, VelocityHead(config.width, config.latent_channels))
    with torch.no_grad():
        blocks = model.transformer.transformer_blocks
        modulations = [layer for block in blocks for layer in (block.img_mod[1], block.txt_mod[1])]
        for linear in (*modulations, model.transformer.norm_out.linear, model.head.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


def build_student(teacher: QwenImage, config: ModelConfig, policy: PolicyConfig, seed: int) -> QwenImage:
    """A student with the teacher's weights and a policy head that starts from the teacher's output projection."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_policy_head(config.width, config.latent_channels, policy)
        student = QwenImage(config, head)
    student.transformer.load_state_dict(teacher.transformer.state_dict())
    head.init_from_teacher(teacher.head, generator)
    return student
