"""DiT (SiT, REPA): a transformer over image tokens that is told a class and the noise level through its modulations.

Parameter names are those of diffusers' DiTTransformer2DModel with one embedder for all blocks (`emb`), as LakonLab publishes flow
DiTs and their students; the arithmetic is SiT's, to which tests/numerics/test_dit.py holds this module. The prompt's embedding is
one row, one-hot over the classes and "no class".

Teachers are read in two layouts, which config.json's _class_name tells apart:
- "DiTTransformer2DModelMod": the names above.
- "SiT" and "REPA": the names of SiT's and REPA's own checkpoints. REPA predicts eps - x_0 at the noise level, as is done here. SiT
  has it the other way round: its time is 1 - sigma and its velocity x_0 - eps. Both are moved into weights: the output layer
  changes its sign, and the first layer of the time embedder reads sines and cosines of 1 - sigma as mixtures of those of sigma.
  REPA's projectors are left out, and of a learn_sigma checkpoint's outputs the second half, which no sampler uses.

B batch, C latent channels, H W latent size, T image tokens, D width, N heads, E head width, V classes and one.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_dist.config import ConfigError, ModelConfig, require
from piflow_dist.models.heads import PATCH, pack
from piflow_dist.models.layers import (
    EPS,
    TIME_CHANNELS,
    Mlp,
    at_least_float32,
    embedder,
    modulate,
    sinusoids,
    two_layers,
)
from piflow_dist.models.lora import apply_linear
from piflow_dist.models.transformer import Published, Rule, Transformer
from piflow_dist.models.weights import RowView, ScaledView, View, shape_of


class ClassTable(nn.Module):
    """(B,V) one-hot -> (B,D). A matrix product: mixtures of classes are fine, and so are gradients of any batch."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(classes, width))

    def forward(self, onehot_BV: Tensor) -> Tensor:
        return onehot_BV @ self.weight


class Conditioning(nn.Module):
    """Noise level and class: (B,), (B,V) -> (B,D)."""

    def __init__(self, width: int, classes: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.timestep_embedder = embedder(TIME_CHANNELS, width)
        self.class_embedder = nn.Module()
        self.class_embedder.embedding_table = ClassTable(classes, width)

    def forward(self, sigma_B: Tensor, onehot_BV: Tensor, adapted: bool) -> Tensor:
        waves_BF = sinusoids(self.time_scale * at_least_float32(sigma_B)).to(onehot_BV.dtype)
        return two_layers(self.timestep_embedder, waves_BF, adapted) + self.class_embedder.embedding_table(onehot_BV)


@lru_cache(maxsize=64)
def positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(T, D): sines and cosines of a token's column, then of its row."""
    frequencies = 10_000 ** (-torch.arange(channels // 4, device=device, dtype=torch.float64) / (channels // 4))
    rows, columns = (torch.arange(size, device=device, dtype=torch.float64) for size in (height, width))
    place_2T = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).flatten(1)
    angles_2TF = place_2T[..., None] * frequencies
    return torch.cat([angles_2TF.sin(), angles_2TF.cos()], dim=-1).permute(1, 0, 2).flatten(1).float()


class Attention(nn.Module):
    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BTD: Tensor, adapted: bool) -> Tensor:
        # Under tensor parallelism: this rank's heads.
        q, k, v = (
            apply_linear(layer, x_BTD, adapted).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out_BTD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return apply_linear(self.to_out[0], out_BTD, adapted)


class Block(nn.Module):
    """Modulated attention and MLP, each added through a gate."""

    def __init__(self, width: int, head_width: int, norm_eps: float):
        super().__init__()
        self.norm_eps = norm_eps
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(width, 6 * width)
        self.attn1, self.ff = Attention(width, head_width), Mlp(width)

    def forward(self, x_BTD: Tensor, temb_BD: Tensor, adapted: bool) -> Tensor:
        mod = apply_linear(self.norm1.linear, F.silu(temb_BD), adapted)[:, None].chunk(6, dim=-1)
        x_BTD = torch.addcmul(x_BTD, mod[2], self.attn1(modulate(x_BTD, *mod[:2]), adapted))
        return torch.addcmul(x_BTD, mod[5], self.ff(modulate(x_BTD, *mod[3:5], self.norm_eps), adapted))


BLOCK = r"transformer_blocks\.\d+\."
SIT, REPA = "SiT", "REPA"
MOD_EPS = 1e-5
"""norm_eps of DiTTransformer2DModelMod and the students made of it where config.json does not say it."""


class DiT(Transformer):
    """Transformer of config.architecture "dit"."""

    plan = (
        Rule(BLOCK + "attn1", "shared input"),
        Rule(BLOCK + r"attn1\.to_[qkv]", "column"),
        Rule(BLOCK + r"attn1\.to_out\.0", "row"),
        Rule(BLOCK + r"ff\.net\.0\.proj", "column"),
        Rule(BLOCK + r"ff\.net\.2", "row"),
        Rule(BLOCK + r"norm1\.linear", "column, joined"),
    )
    adaptable = ("transformer_blocks.", "emb.timestep_embedder.", "pos_embed.")
    image_layer = "pos_embed.proj"
    leaf_modules = (Block,)
    usual = ((32, 32), 1)
    published = Published(nfe=1, final_step_size_scale=1.0, shift=1.0, guidance=3.2)
    channels_last, shift_first, packed = True, True, False
    classes = ("DiTTransformer2DModelMod", "GMDiTTransformer2DModelV2", "DXDiTTransformer2DModel")
    other_classes = (SIT, REPA)
    teacher_keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "num_embeds_ada_norm")

    def __init__(self, config: ModelConfig, head: nn.Module, tied: bool = False):
        super().__init__()
        width = config.width
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Linear(config.latent_channels * PATCH * PATCH, width)
        self.emb = Conditioning(width, config.joint_attention_dim, config.time_scale)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.attention_head_dim, config.norm_eps) for _ in range(config.num_layers)
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
        dtype, (H, W) = self.emb.class_embedder.embedding_table.weight.dtype, x_BCHW.shape[-2:]
        x_BTD = apply_linear(self.pos_embed.proj, pack(x_BCHW.to(dtype)), adapted)
        x_BTD = x_BTD + positions(H // PATCH, W // PATCH, x_BTD.shape[-1], x_BCHW.device).to(dtype)
        temb_BD = self.add_span(self.emb(sigma_B, text_BLD[:, 0].to(dtype), adapted), span_B, adapted)
        for index, block in enumerate(self.transformer_blocks):
            x_BTD = self.run_block(index, block, x_BTD, temb_BD, adapted)
        norm_out, head = self.output(adapted)
        return head(norm_out(x_BTD, temb_BD), temb_BD, (H, W))

    def zero_at_first(self) -> list[nn.Linear]:
        return [block.norm1.linear for block in self.transformer_blocks]

    @classmethod
    def shape_json(cls, config: ModelConfig) -> dict[str, Any]:
        return {
            "in_channels": config.latent_channels,
            "num_layers": config.num_layers,
            "attention_head_dim": config.attention_head_dim,
            "num_attention_heads": config.num_attention_heads,
            "num_embeds_ada_norm": config.joint_attention_dim - 1,
            "norm_eps": config.norm_eps,
            "patch_size": PATCH,
            "time_scale": config.time_scale,
        }

    @classmethod
    def read_shape(cls, found: dict[str, Any]) -> ModelConfig:
        return ModelConfig(
            architecture="dit",
            num_layers=found["num_layers"],
            num_attention_heads=found["num_attention_heads"],
            attention_head_dim=found["attention_head_dim"],
            latent_channels=found["in_channels"],
            joint_attention_dim=found["num_embeds_ada_norm"] + 1,
            axes_dims_rope=[],
            time_scale=float(found.get("time_scale", 1.0)),
            norm_eps=float(found.get("norm_eps", EPS if found.get("_class_name") in cls.other_classes else MOD_EPS)),
        )

    @classmethod
    def check_teacher(cls, where: str, found: dict[str, Any]) -> None:
        if found.get("patch_size", PATCH) != PATCH:
            raise ConfigError(f"{where}: patch_size={found['patch_size']} is not supported, only 2 x 2 patches.")

    @classmethod
    def from_published(cls, views: Mapping[str, View], config: ModelConfig, found: dict[str, Any]) -> dict[str, View]:
        if "x_embedder.proj.weight" in views:
            views = from_sit(views, config, backwards=found.get("_class_name") == SIT)
        ours = {our_name(name): view for name, view in views.items() if not name.startswith("pos_embed.pos_embed")}
        if "pos_embed.proj.weight" in ours and len(shape_of(kernel := ours["pos_embed.proj.weight"])) == 4:
            ours["pos_embed.proj.weight"] = RowView(kernel, 0, config.width, lambda rows: rows.flatten(1))
        return ours

    @classmethod
    def to_published(cls, name: str, value: Tensor, config: ModelConfig) -> Tensor:
        if name == "pos_embed.proj.weight":  # the kernel of a convolution
            return value.unflatten(1, (config.latent_channels, PATCH, PATCH))
        return value

    @classmethod
    def published_name(cls, name: str) -> str:
        if name.startswith("norm_out.linear."):
            return name.replace("norm_out.linear.", "proj_out_1.")
        return name.replace("head.proj_out.", "proj_out_2.").removeprefix("head.")


def our_name(name: str) -> str:
    if name.startswith("proj_out_1."):
        return name.replace("proj_out_1.", "norm_out.linear.")
    name = name.replace("proj_out_2.", "proj_out.") if name.startswith("proj_out_2.") else name
    return f"head.{name}" if name.startswith("proj_out") else name


RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
RENAMED_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
"""Layer of a SiT checkpoint -> layer here, both without .weight and .bias."""


def from_sit(views: Mapping[str, View], config: ModelConfig, backwards: bool) -> dict[str, View]:
    """SiT's names -> published names of this module. backwards: from the time and velocity of SiT itself."""
    out: dict[str, View] = {}
    for name, view in views.items():
        layer, _, kind = name.rpartition(".")
        if name == "pos_embed":
            check_positions(view, config)
        elif name.startswith("projectors."):
            continue
        elif layer.startswith("blocks."):
            _, index, inner = layer.split(".", 2)
            block = f"transformer_blocks.{index}"
            if inner == "attn.qkv":
                third = shape_of(view)[0] // 3
                for i, part in enumerate(("to_q", "to_k", "to_v")):
                    out[f"{block}.attn1.{part}.{kind}"] = RowView(view, i * third, (i + 1) * third)
            else:
                out[f"{block}.{RENAMED_IN_BLOCK.get(inner, inner)}.{kind}"] = view
        else:
            out[f"{RENAMED.get(layer, layer)}.{kind}"] = view
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        if name in out:
            out[name] = first_half(out[name], config.latent_channels)
            out[name] = ScaledView(out[name], -1.0) if backwards else out[name]
    first = "emb.timestep_embedder.linear_1.weight"
    if backwards and first in out:
        out[first] = from_the_end(out[first], config)
    return out


def first_half(view: View, channels: int) -> View:
    """Of an output layer that predicts a variance too: rows are pixels, then channels. (Small: it is read at once.)"""
    rows = shape_of(view)[0]
    if rows != 2 * PATCH**2 * channels:
        return view
    return view[:].unflatten(0, (PATCH**2, 2, channels))[:, 0].flatten(0, 1)


def from_the_end(view: View, config: ModelConfig) -> View:
    """W with W sinusoids(scale (1 - sigma)) = W' sinusoids(scale sigma): cosines and sines of a difference."""
    half = TIME_CHANNELS // 2
    end = config.time_scale * torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000) / half))

    def turned(rows: Tensor) -> Tensor:
        cos, sin = rows.double().split(half, dim=1)
        return torch.cat([cos * end.cos() + sin * end.sin(), cos * end.sin() - sin * end.cos()], dim=1).float()

    return RowView(view, 0, shape_of(view)[0], turned)


def check_positions(view: View, config: ModelConfig) -> None:
    """The positions that checkpoints hold are those that are computed here."""
    found = view[:].float().flatten(0, -2)
    side = math.isqrt(len(found))
    require(
        found.shape[1] == config.width and side * side == len(found)
        and torch.allclose(found, positions(side, side, config.width, found.device), atol=1e-4),
        f"pos_embed {tuple(found.shape)} of this checkpoint is not the fixed embedding by sines and cosines, the only one supported.",
    )  # fmt: skip
