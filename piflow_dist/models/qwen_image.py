"""Qwen-Image's MMDiT (a dual-stream diffusion transformer over image and text tokens) as one plain module.

Written afresh: importing diffusers' model costs ten seconds a process, and the engine wants blocks it can hook. Parameter
names and arithmetic are those of diffusers' QwenImageTransformer2DModel, and tests/numerics/test_qwen_image.py holds this
module to it, forward and gradients. The output projection is a head of `heads.py`, which teacher and students do not share.

B batch, C latent channels, H W latent size, T image tokens, L text tokens, S = L + T, D width, N heads, E head width.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_dist.config import ConfigError, ModelConfig
from piflow_dist.models.heads import PATCH, pack
from piflow_dist.models.layers import (
    EPS,
    TIME_CHANNELS,
    Mlp,
    at_least_float32,
    embedder,
    modulate,
    rotate,
    sinusoids,
    two_layers,
)
from piflow_dist.models.lora import apply_linear
from piflow_dist.models.transformer import Rule, Transformer


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 sigma, and of 1000 times the guidance scale, each through a two-layer MLP: (B,) -> (B,D)."""

    def __init__(self, width: int, guidance_embeds: bool):
        super().__init__()
        self.timestep_embedder = embedder(TIME_CHANNELS, width)
        self.guidance_embedder = embedder(TIME_CHANNELS, width) if guidance_embeds else None

    def forward(self, sigma_B: Tensor, guidance_B: Tensor | None, dtype: torch.dtype, adapted: bool = True) -> Tensor:
        if (guidance_B is None) != (self.guidance_embedder is None):
            raise ValueError(
                f"guidance_B is {'missing' if guidance_B is None else 'given'}, but this model has "
                f"guidance_embeds={self.guidance_embedder is not None}."
            )
        temb_BD = embed(self.timestep_embedder, sigma_B, dtype, adapted)
        if guidance_B is None:
            return temb_BD
        return temb_BD + embed(self.guidance_embedder, guidance_B, dtype, adapted)


def embed(module: nn.Module, value_B: Tensor, dtype: torch.dtype, adapted: bool) -> Tensor:
    # The published models round the value to the network's dtype before the sinusoids.
    return two_layers(module, sinusoids(1000 * at_least_float32(value_B.to(dtype))).to(dtype), adapted)


@lru_cache(maxsize=64)
def rotary_angles(
    height: int, width: int, text_length: int, axes: tuple[int, int, int], device: torch.device
) -> Tensor:
    """exp(i angle), complex (S, E/2), text tokens first: image positions are centred, text runs on from the image's edge."""
    rows = torch.arange(height, device=device) - (height - height // 2)
    columns = torch.arange(width, device=device) - (width - width // 2)
    image_T3 = torch.stack(
        [torch.zeros(height, width, device=device), *torch.meshgrid(rows.float(), columns.float(), indexing="ij")], -1
    ).reshape(-1, 3)
    start = max(height // 2, width // 2)
    text_L3 = torch.arange(start, start + text_length, device=device).float()[:, None].expand(-1, 3)
    position_S3 = torch.cat([text_L3, image_T3])
    angles = [
        position_S3[:, axis, None] / 10_000 ** (torch.arange(0, dim, 2, device=device).float() / dim)
        for axis, dim in enumerate(axes)
    ]
    angles_SE = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles_SE), angles_SE)


class JointAttention(nn.Module):
    """Text and image tokens attend to one another, each stream through its own projections."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, nn.RMSNorm(head_width, eps=EPS))

    def forward(
        self,
        image_BTD: Tensor,
        text_BLD: Tensor,
        mask_B11S: Tensor | None,
        rotary_SE: Tensor,
        adapted: bool,
    ) -> tuple[Tensor, Tensor]:
        def heads(layer: nn.Module, x: Tensor) -> Tensor:
            # Under tensor parallelism: this rank's heads.
            return apply_linear(layer, x, adapted).unflatten(-1, (-1, self.head_width))

        q_text, k_text = self.norm_added_q(heads(self.add_q_proj, text_BLD)), heads(self.add_k_proj, text_BLD)
        q_image, k_image = self.norm_q(heads(self.to_q, image_BTD)), heads(self.to_k, image_BTD)
        q_BSNE = torch.cat([q_text, q_image], dim=1)
        k_BSNE = torch.cat([self.norm_added_k(k_text), self.norm_k(k_image)], dim=1)
        v_BSNE = torch.cat([heads(self.add_v_proj, text_BLD), heads(self.to_v, image_BTD)], dim=1)
        q_BSNE, k_BSNE = rotate(q_BSNE, rotary_SE), rotate(k_BSNE, rotary_SE)
        out_BNSE = F.scaled_dot_product_attention(
            q_BSNE.transpose(1, 2), k_BSNE.transpose(1, 2), v_BSNE.transpose(1, 2), attn_mask=mask_B11S
        )
        out_BSD = out_BNSE.transpose(1, 2).flatten(2)
        text_out, image_out = out_BSD.split([text_BLD.shape[1], image_BTD.shape[1]], dim=1)
        return apply_linear(self.to_out[0], image_out, adapted), apply_linear(self.to_add_out, text_out, adapted)


class Block(nn.Module):
    """Both streams: modulated attention and MLP, each added through a gate that the noise level sets."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = JointAttention(width, heads, head_width)
        self.img_mlp, self.txt_mlp = Mlp(width), Mlp(width)

    def forward(
        self,
        image_BTD: Tensor,
        text_BLD: Tensor,
        mask_B11S: Tensor | None,
        temb_BD: Tensor,
        rotary_SE: Tensor,
        adapted: bool,
    ) -> tuple[Tensor, Tensor]:
        image_mod, text_mod = (
            apply_linear(mod[1], F.silu(temb_BD), adapted)[:, None].chunk(6, dim=-1)
            for mod in (self.img_mod, self.txt_mod)
        )
        image_out, text_out = self.attn(
            modulate(image_BTD, *image_mod[:2]), modulate(text_BLD, *text_mod[:2]), mask_B11S, rotary_SE, adapted
        )
        image_BTD = torch.addcmul(image_BTD, image_mod[2], image_out)
        text_BLD = torch.addcmul(text_BLD, text_mod[2], text_out)
        image_out = self.img_mlp(modulate(image_BTD, *image_mod[3:5]), adapted)
        text_out = self.txt_mlp(modulate(text_BLD, *text_mod[3:5]), adapted)
        return torch.addcmul(image_BTD, image_mod[5], image_out), torch.addcmul(text_BLD, text_mod[5], text_out)


BLOCK = r"transformer_blocks\.\d+\."


class QwenImage(Transformer):
    """Transformer of config.architecture "qwen_image". Published timesteps are 1000 sigma."""

    plan = (
        # Whole attention heads. Queries, keys and values of a stream read one input: its gradient is summed once for the three.
        Rule(BLOCK + r"attn", "shared input"),
        Rule(BLOCK + r"attn\.(to_[qkv]|add_[qkv]_proj)", "column"),
        Rule(BLOCK + r"attn\.(to_out\.0|to_add_out)", "row"),
        # One weight per channel of a head, for every head: a rank's gradient is that of its own heads.
        Rule(BLOCK + r"attn\.norm_(added_)?[qk]", "partial norm"),
        Rule(BLOCK + r"(img|txt)_mlp\.net\.0\.proj", "column"),
        Rule(BLOCK + r"(img|txt)_mlp\.net\.2", "row"),
        # A third of the model. What comes out is small (six numbers per channel and image), and whole channels are wanted.
        Rule(BLOCK + r"(img|txt)_mod\.1", "column, joined"),
    )
    adaptable = ("transformer_blocks.", "time_text_embed.", "img_in", "txt_in")
    image_layer = "img_in"
    leaf_modules = (Block,)
    classes = ("QwenImageTransformer2DModel", "GMQwenImageTransformer2DModel", "DXQwenImageTransformer2DModel")
    teacher_keys = (
        *("patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim"),
        *("joint_attention_dim", "axes_dims_rope"),
    )

    def __init__(self, config: ModelConfig, head: nn.Module, tied: bool = False):
        super().__init__()
        width = config.width
        self.axes = tuple(config.axes_dims_rope)
        self.time_text_embed = TimestepEmbedder(width, config.guidance_embeds)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.img_in = nn.Linear(config.latent_channels * PATCH * PATCH, width)
        self.txt_in = nn.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_attention_heads, config.attention_head_dim) for _ in range(config.num_layers)
        )
        self.add_output(config, head, tied)

    def forward(
        self,
        x_BCHW: Tensor,
        sigma_B: Tensor,
        text_BLD: Tensor,
        mask_BL: Tensor | None,
        guidance_B: Tensor | None = None,
        span_B: Tensor | None = None,
        *,
        adapted: bool = True,
    ) -> Tensor | dict[str, Tensor]:
        dtype, (H, W) = self.txt_norm.weight.dtype, x_BCHW.shape[-2:]
        image_BTD = apply_linear(self.img_in, pack(x_BCHW.to(dtype)), adapted)
        text_BLD = apply_linear(self.txt_in, self.txt_norm(text_BLD.to(dtype)), adapted)
        temb_BD = self.add_span(self.time_text_embed(sigma_B, guidance_B, dtype, adapted), span_B, adapted)
        rotary_SE = rotary_angles(H // PATCH, W // PATCH, text_BLD.shape[1], self.axes, x_BCHW.device)
        mask_B11S = None if mask_BL is None else F.pad(mask_BL, (0, image_BTD.shape[1]), value=True)[:, None, None]
        for index, block in enumerate(self.transformer_blocks):
            inputs = (image_BTD, text_BLD, mask_B11S, temb_BD, rotary_SE, adapted)
            image_BTD, text_BLD = self.run_block(index, block, *inputs)
        norm_out, head = self.output(adapted)
        return head(norm_out(image_BTD, temb_BD), temb_BD, (H, W))

    def zero_at_first(self) -> list[nn.Linear]:
        return [layer for block in self.transformer_blocks for layer in (block.img_mod[1], block.txt_mod[1])]

    @classmethod
    def unread_of(cls, config: ModelConfig) -> set[str]:
        return unread_parameters(config.num_layers)

    @classmethod
    def shape_json(cls, config: ModelConfig) -> dict[str, Any]:
        shape = {
            "in_channels": config.latent_channels * PATCH * PATCH,
            "num_layers": config.num_layers,
            "attention_head_dim": config.attention_head_dim,
            "num_attention_heads": config.num_attention_heads,
            "joint_attention_dim": config.joint_attention_dim,
            "axes_dims_rope": list(config.axes_dims_rope),
        }
        return shape | {"guidance_embeds": True} if config.guidance_embeds else shape

    @classmethod
    def teacher_json(cls, config: ModelConfig) -> dict[str, Any]:
        return {"guidance_embeds": config.guidance_embeds, "patch_size": PATCH, "out_channels": config.latent_channels}

    @classmethod
    def read_shape(cls, found: dict[str, Any]) -> ModelConfig:
        return ModelConfig(
            num_layers=found["num_layers"],
            num_attention_heads=found["num_attention_heads"],
            attention_head_dim=found["attention_head_dim"],
            latent_channels=found["in_channels"] // PATCH**2,
            joint_attention_dim=found["joint_attention_dim"],
            axes_dims_rope=list(found["axes_dims_rope"]),
            guidance_embeds=bool(found.get("guidance_embeds")),
        )

    @classmethod
    def check_teacher(cls, where: str, found: dict[str, Any]) -> None:
        for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if found.get(option):
                raise ConfigError(
                    f"{where} has {option}=true (an editing or layered variant of Qwen-Image), which this model does not have. "
                    "Use a text-to-image checkpoint."
                )
        if found["patch_size"] != PATCH or found["in_channels"] != PATCH**2 * found["out_channels"]:
            raise ConfigError(
                f"{where}: only 2 x 2 patches of the latent are supported (patch_size=2, in_channels=4 out_channels)."
            )

    @classmethod
    def predicts_more(cls, found: dict[str, Any]) -> bool:
        return found.get("patch_size") == 1


def unread_parameters(num_layers: int) -> set[str]:
    """Nothing reads the text tokens that leave the last block."""
    layers = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    return {f"transformer_blocks.{num_layers - 1}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
