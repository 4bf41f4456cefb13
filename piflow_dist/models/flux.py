"""FLUX.1's transformer: double blocks as Qwen-Image's, then single blocks on text and image tokens in one stream.

Parameter names and arithmetic are those of diffusers' FluxTransformer2DModel, to which tests/numerics/test_flux.py holds this
module. Of a prompt's embedding the first row is CLIP's pooled vector, the others are T5's, all of them attended: there is no mask.

A single block's proj_out reads attention and MLP side by side. Here its columns are in another order: head by head, the head's
channels and then its share of the MLP's, so that a tensor-parallel rank's heads and MLP channels are one range of columns, in
memory, in checkpoints and in adapters. from_published and to_published change the order.

B batch, C latent channels, H W latent size, T image tokens, L text tokens, S = L + T, D width, N heads, E head width, M MLP width.
"""

from collections.abc import Mapping
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
from piflow_dist.models.transformer import Published, Rule, Transformer, our_name
from piflow_dist.models.weights import RowView, View, shape_of

MLP_RATIO = 4


class Conditioning(nn.Module):
    """Noise level, guidance scale (for models with guidance_embeds) and pooled prompt: (B,), (B,), (B,P) -> (B,D)."""

    def __init__(self, width: int, pooled: int, guidance_embeds: bool):
        super().__init__()
        self.timestep_embedder = embedder(TIME_CHANNELS, width)
        self.guidance_embedder = embedder(TIME_CHANNELS, width) if guidance_embeds else None
        self.text_embedder = embedder(pooled, width)

    def forward(self, sigma_B: Tensor, guidance_B: Tensor | None, pooled_BP: Tensor, adapted: bool) -> Tensor:
        if (guidance_B is None) != (self.guidance_embedder is None):
            raise ValueError(
                f"guidance_B is {'missing' if guidance_B is None else 'given'}, but this model has "
                f"guidance_embeds={self.guidance_embedder is not None}."
            )
        temb_BD = embed(self.timestep_embedder, sigma_B, pooled_BP.dtype, adapted)
        if guidance_B is not None:
            temb_BD = temb_BD + embed(self.guidance_embedder, guidance_B, pooled_BP.dtype, adapted)
        return temb_BD + two_layers(self.text_embedder, pooled_BP, adapted)


def embed(module: nn.Module, value_B: Tensor, dtype: torch.dtype, adapted: bool) -> Tensor:
    # The published model multiplies in the network's dtype: 3500 is 3504 in bf16.
    return two_layers(module, sinusoids(at_least_float32(value_B.to(dtype) * 1000)).to(dtype), adapted)


@lru_cache(maxsize=64)
def rotary_angles(
    height: int, width: int, text_length: int, axes: tuple[int, int, int], device: torch.device
) -> Tensor:
    """exp(i angle), complex (S, E/2), text tokens first: all at the origin. Image tokens turn with their row and column."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.float64) for size in (height, width))
    image_T3 = torch.stack(
        [torch.zeros(height, width, device=device), *torch.meshgrid(rows, columns, indexing="ij")], -1
    ).reshape(-1, 3)
    position_S3 = torch.cat([image_T3.new_zeros(text_length, 3), image_T3])
    angles = [
        position_S3[:, axis, None] / 10_000 ** (torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes)
    ]
    angles_SE = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angles_SE), angles_SE).to(torch.complex64)


def attend(q_BSNE: Tensor, k_BSNE: Tensor, v_BSNE: Tensor, rotary_SE: Tensor) -> Tensor:
    """-> (B,S,N,E)"""
    q_BSNE, k_BSNE = rotate(q_BSNE, rotary_SE), rotate(k_BSNE, rotary_SE)
    heads_first = (x.transpose(1, 2) for x in (q_BSNE, k_BSNE, v_BSNE))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Attention(nn.Module):
    """Queries, keys and values of one stream. Its outputs, not yet projected, are (B,S,N,E)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm_q, self.norm_k = nn.RMSNorm(head_width, eps=EPS), nn.RMSNorm(head_width, eps=EPS)
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, width))

    def heads(self, layer: nn.Module, x: Tensor, adapted: bool) -> Tensor:
        # Under tensor parallelism: this rank's heads.
        return apply_linear(layer, x, adapted).unflatten(-1, (-1, self.head_width))

    def forward(self, x_BSD: Tensor, rotary_SE: Tensor, adapted: bool) -> Tensor:
        q, k, v = (self.heads(layer, x_BSD, adapted) for layer in (self.to_q, self.to_k, self.to_v))
        return attend(self.norm_q(q), self.norm_k(k), v, rotary_SE)


class JointAttention(Attention):
    """Text and image tokens attend to one another, each stream through its own projections."""

    def __init__(self, width: int, head_width: int):
        super().__init__(width, head_width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_added_q, self.norm_added_k = nn.RMSNorm(head_width, eps=EPS), nn.RMSNorm(head_width, eps=EPS)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, image_BTD: Tensor, text_BLD: Tensor, rotary_SE: Tensor, adapted: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (self.heads(layer, image_BTD, adapted) for layer in (self.to_q, self.to_k, self.to_v))
        text = (self.heads(layer, text_BLD, adapted) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        q_text, k_text, v_text = text
        q_BSNE = torch.cat([self.norm_added_q(q_text), self.norm_q(q)], dim=1)
        k_BSNE = torch.cat([self.norm_added_k(k_text), self.norm_k(k)], dim=1)
        out_BSD = attend(q_BSNE, k_BSNE, torch.cat([v_text, v], dim=1), rotary_SE).flatten(2)
        text_out, image_out = out_BSD.split([text_BLD.shape[1], image_BTD.shape[1]], dim=1)
        return apply_linear(self.to_out[0], image_out, adapted), apply_linear(self.to_add_out, text_out, adapted)


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the conditioning: (B,D) -> `count` times (B,1,D)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.linear, self.count = nn.Linear(width, count * width), count

    def forward(self, temb_BD: Tensor, adapted: bool) -> tuple[Tensor, ...]:
        return apply_linear(self.linear, F.silu(temb_BD), adapted)[:, None].chunk(self.count, dim=-1)


class DoubleBlock(nn.Module):
    """Image and text stream: modulated attention over both and an MLP each, added through gates."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(width, head_width)
        self.ff, self.ff_context = Mlp(width), Mlp(width)

    def forward(
        self, image_BTD: Tensor, text_BLD: Tensor, temb_BD: Tensor, rotary_SE: Tensor, adapted: bool
    ) -> tuple[Tensor, Tensor]:
        image_mod, text_mod = self.norm1(temb_BD, adapted), self.norm1_context(temb_BD, adapted)
        image_out, text_out = self.attn(
            modulate(image_BTD, *image_mod[:2]), modulate(text_BLD, *text_mod[:2]), rotary_SE, adapted
        )
        image_BTD = torch.addcmul(image_BTD, image_mod[2], image_out)
        text_BLD = torch.addcmul(text_BLD, text_mod[2], text_out)
        image_out = self.ff(modulate(image_BTD, *image_mod[3:5]), adapted)
        text_out = self.ff_context(modulate(text_BLD, *text_mod[3:5]), adapted)
        return torch.addcmul(image_BTD, image_mod[5], image_out), torch.addcmul(text_BLD, text_mod[5], text_out)


class SingleBlock(nn.Module):
    """Attention and MLP of all tokens side by side, joined by one projection."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, MLP_RATIO * width)
        self.proj_out = nn.Linear((1 + MLP_RATIO) * width, width)
        self.attn = Attention(width, head_width)

    def forward(self, x_BSD: Tensor, temb_BD: Tensor, rotary_SE: Tensor, adapted: bool) -> Tensor:
        shift, scale, gate = self.norm(temb_BD, adapted)
        inputs_BSD = modulate(x_BSD, shift, scale)
        mlp_BSM = F.gelu(apply_linear(self.proj_mlp, inputs_BSD, adapted), approximate="tanh")
        attention_BSNE = self.attn(inputs_BSD, rotary_SE, adapted)
        share = mlp_BSM.unflatten(-1, (attention_BSNE.shape[2], -1))
        both_BSX = torch.cat([attention_BSNE, share], dim=-1).flatten(2)
        return torch.addcmul(x_BSD, gate, apply_linear(self.proj_out, both_BSX, adapted))


def by_heads(config: ModelConfig) -> Tensor:
    """Column j of our proj_out is column by_heads[j] of the published one."""
    attention = torch.arange(config.width).unflatten(0, (config.num_attention_heads, -1))
    mlp = torch.arange(MLP_RATIO * config.width).unflatten(0, (config.num_attention_heads, -1)) + config.width
    return torch.cat([attention, mlp], dim=1).flatten()


DOUBLE, SINGLE = r"transformer_blocks\.\d+\.", r"single_transformer_blocks\.\d+\."
REORDERED = (".proj_out.weight", ".proj_out.lora_A.weight")


class Flux(Transformer):
    """Transformer of config.architecture "flux". Published timesteps are 1000 sigma, guidance scales times 1000."""

    plan = (
        # Whole attention heads, as in Qwen-Image's plan.
        Rule(DOUBLE + "attn", "shared input"),
        Rule(DOUBLE + r"attn\.(to_[qkv]|add_[qkv]_proj)", "column"),
        Rule(DOUBLE + r"attn\.(to_out\.0|to_add_out)", "row"),
        Rule(DOUBLE + r"attn\.norm_(added_)?[qk]", "partial norm"),
        Rule(DOUBLE + r"ff(_context)?\.net\.0\.proj", "column"),
        Rule(DOUBLE + r"ff(_context)?\.net\.2", "row"),
        Rule(DOUBLE + r"norm1(_context)?\.linear", "column, joined"),
        Rule(SINGLE + "attn", "shared input"),
        Rule(SINGLE + r"attn\.to_[qkv]", "column"),
        Rule(SINGLE + r"attn\.norm_[qk]", "partial norm"),
        Rule(SINGLE + "proj_mlp", "column"),
        # Columns by heads: this rank's heads and its channels of the MLP are one range.
        Rule(SINGLE + "proj_out", "row"),
        Rule(SINGLE + r"norm\.linear", "column, joined"),
    )
    adaptable = (
        *("transformer_blocks.", "single_transformer_blocks.", "time_text_embed."),
        *("x_embedder", "context_embedder"),
    )
    image_layer = "x_embedder"
    leaf_modules = (DoubleBlock, SingleBlock)
    depths = ("num_layers", "num_single_layers")
    usual = ((128, 128), 513)
    published = Published(guidance=3.5)
    classes = ("FluxTransformer2DModel", "GMFluxTransformer2DModel", "DXFluxTransformer2DModel")
    teacher_keys = (
        *("in_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim"),
        *("joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
    )

    def __init__(self, config: ModelConfig, head: nn.Module, tied: bool = False):
        super().__init__()
        width, head_width = config.width, config.attention_head_dim
        self.axes, self.pooled = tuple(config.axes_dims_rope), config.pooled_projection_dim
        self.time_text_embed = Conditioning(width, config.pooled_projection_dim, config.guidance_embeds)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.x_embedder = nn.Linear(config.latent_channels * PATCH * PATCH, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, head_width) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, head_width) for _ in range(config.num_single_layers)
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
        dtype, (H, W) = self.transformer_blocks[0].attn.norm_q.weight.dtype, x_BCHW.shape[-2:]
        text_BLD = text_BLD.to(dtype)
        temb_BD = self.add_span(
            self.time_text_embed(sigma_B, guidance_B, text_BLD[:, 0, : self.pooled], adapted), span_B, adapted
        )
        image_BTD = apply_linear(self.x_embedder, pack(x_BCHW.to(dtype)), adapted)
        text_BLD = apply_linear(self.context_embedder, text_BLD[:, 1:], adapted)
        L = text_BLD.shape[1]
        rotary_SE = rotary_angles(H // PATCH, W // PATCH, L, self.axes, x_BCHW.device)
        for index, block in enumerate(self.transformer_blocks):
            image_BTD, text_BLD = self.run_block(index, block, image_BTD, text_BLD, temb_BD, rotary_SE, adapted)
        x_BSD = torch.cat([text_BLD, image_BTD], dim=1)
        for index, block in enumerate(self.single_transformer_blocks, len(self.transformer_blocks)):
            x_BSD = self.run_block(index, block, x_BSD, temb_BD, rotary_SE, adapted)
        norm_out, head = self.output(adapted)
        return head(norm_out(x_BSD[:, L:], temb_BD), temb_BD, (H, W))

    def zero_at_first(self) -> list[nn.Linear]:
        return [module.linear for module in self.modules() if isinstance(module, Modulation)]

    @classmethod
    def shape_json(cls, config: ModelConfig) -> dict[str, Any]:
        return {
            "in_channels": config.latent_channels * PATCH * PATCH,
            "num_layers": config.num_layers,
            "num_single_layers": config.num_single_layers,
            "attention_head_dim": config.attention_head_dim,
            "num_attention_heads": config.num_attention_heads,
            "joint_attention_dim": config.joint_attention_dim,
            "pooled_projection_dim": config.pooled_projection_dim,
            "guidance_embeds": config.guidance_embeds,
            "axes_dims_rope": list(config.axes_dims_rope),
        }

    @classmethod
    def teacher_json(cls, config: ModelConfig) -> dict[str, Any]:
        return {"patch_size": 1, "out_channels": None}

    @classmethod
    def read_shape(cls, found: dict[str, Any]) -> ModelConfig:
        return ModelConfig(
            architecture="flux",
            num_layers=found["num_layers"],
            num_single_layers=found["num_single_layers"],
            num_attention_heads=found["num_attention_heads"],
            attention_head_dim=found["attention_head_dim"],
            latent_channels=found["in_channels"] // PATCH**2,
            joint_attention_dim=found["joint_attention_dim"],
            pooled_projection_dim=found["pooled_projection_dim"],
            axes_dims_rope=list(found.get("axes_dims_rope", (16, 56, 56))),  # FLUX.1-dev's file does not say it
            guidance_embeds=bool(found["guidance_embeds"]),
        )

    @classmethod
    def check_teacher(cls, where: str, found: dict[str, Any]) -> None:
        packed = found["in_channels"]
        if found.get("patch_size", 1) != 1 or packed % PATCH**2 or found.get("out_channels") not in (None, packed):
            raise ConfigError(
                f"{where}: only text-to-image checkpoints are supported, which read and predict 2 x 2 patches of one latent "
                "(patch_size=1, out_channels=in_channels, a multiple of 4)."
            )

    @classmethod
    def predicts_more(cls, found: dict[str, Any]) -> bool:
        return found.get("out_channels") not in (None, found.get("in_channels"))

    @classmethod
    def from_published(cls, views: Mapping[str, View], config: ModelConfig, found: dict[str, Any]) -> dict[str, View]:
        order = by_heads(config)

        def ours(name: str, view: View) -> View:
            shape = shape_of(view)
            if not reordered(name) or shape[1:] != order.shape:  # of another shape: refused elsewhere, by name
                return view
            return RowView(view, 0, shape[0], lambda rows: rows[:, order])

        return {our_name(name): ours(name, view) for name, view in views.items()}

    @classmethod
    def to_published(cls, name: str, value: Tensor, config: ModelConfig) -> Tensor:
        return value[:, by_heads(config).argsort()] if reordered(name) else value


def reordered(name: str) -> bool:
    return name.startswith("single_transformer_blocks.") and name.endswith(REORDERED)
