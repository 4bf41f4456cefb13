"""Qwen-Image's MMDiT (a dual-stream diffusion transformer over image and text tokens) as one plain module.

Written afresh: importing diffusers' model costs ten seconds a process, and the engine wants blocks it can hook. Parameter
names and arithmetic are those of diffusers' QwenImageTransformer2DModel, and tests/numerics/test_qwen_image.py holds this
module to it, forward and gradients. The output projection is a head of `heads.py`, which teacher and students do not share.

B batch, C latent channels, H W latent size, T image tokens, L text tokens, S = L + T, D width, N heads, E head width.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piflow_dist.config import LoraConfig, ModelConfig, PolicyConfig
from piflow_dist.models.heads import PATCH, VelocityHead, build_policy_head, pack
from piflow_dist.models.lora import InitialAdapters, add_adapters, apply_linear, base_name
from piflow_dist.models.weights import OverlaidWeights, RenamedWeights, TensorWeights, WeightSource, fill

EPS = 1e-6
TIME_CHANNELS = 256
SPAN_SCALE = 0.02
"""Of a segment's length before its sinusoids, the fastest of which then turns 20 radians over a trajectory. MeanFlow's target holds
their derivative, which would be fifty times as large at the noise level's own scale."""


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 sigma, and of 1000 times the guidance scale, each through a two-layer MLP: (B,) -> (B,D).

    takes_span: so is the length of the segment, for students of one mean velocity; a teacher's pass (adapted=False) has none.
    """

    def __init__(self, width: int, guidance_embeds: bool, takes_span: bool = False):
        super().__init__()
        self.timestep_embedder = embedder(width)
        self.guidance_embedder = embedder(width) if guidance_embeds else None
        self.span_embedder = embedder(width) if takes_span else None

    def forward(
        self,
        sigma_B: Tensor,
        guidance_B: Tensor | None,
        dtype: torch.dtype,
        adapted: bool = True,
        span_B: Tensor | None = None,
    ) -> Tensor:
        if (guidance_B is None) != (self.guidance_embedder is None):
            raise ValueError(
                f"guidance_B is {'missing' if guidance_B is None else 'given'}, but this model has "
                f"guidance_embeds={self.guidance_embedder is not None}."
            )
        if (span_B is None) != (self.span_embedder is None or not adapted):
            raise ValueError(
                f"span_B is {'missing' if span_B is None else 'given'}, but this pass is of a "
                f"{'student that takes it' if span_B is None else 'network that does not take it'} (policy.type=mean does)."
            )
        temb_BD = embed(self.timestep_embedder, sigma_B, dtype, adapted)
        if guidance_B is not None:
            temb_BD = temb_BD + embed(self.guidance_embedder, guidance_B, dtype, adapted)
        if span_B is not None:
            temb_BD = temb_BD + embed(self.span_embedder, SPAN_SCALE * span_B, dtype, adapted)
        return temb_BD


def embedder(width: int) -> nn.Module:
    module = nn.Module()
    module.linear_1 = nn.Linear(TIME_CHANNELS, width)
    module.linear_2 = nn.Linear(width, width)
    return module


def embed(module: nn.Module, value_B: Tensor, dtype: torch.dtype, adapted: bool) -> Tensor:
    # The published models round the value to the network's dtype before the sinusoids.
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, device=value_B.device) * (-math.log(10_000) / half))
    angles = 1000 * value_B.to(dtype).to(torch.promote_types(dtype, torch.float32))[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    return apply_linear(module.linear_2, F.silu(apply_linear(module.linear_1, waves, adapted)), adapted)


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


def rotate(x_BSNE: Tensor, rotary_SE: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels, in float32 at least: one pass as complex numbers, six times faster than cos and sin."""
    pairs = torch.view_as_complex(x_BSNE.to(torch.promote_types(x_BSNE.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary_SE[:, None]).flatten(-2).type_as(x_BSNE)


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


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear; the names are diffusers'."""

    def __init__(self, width: int):
        super().__init__()
        up = nn.Module()
        up.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        return apply_linear(
            self.net[2], F.gelu(apply_linear(self.net[0].proj, x, adapted), approximate="tanh"), adapted
        )


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


def modulate(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return torch.addcmul(shift_B1D, F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=EPS), 1 + scale_B1D)


class FinalNorm(nn.Module):
    """Layer norm modulated by the time embedding (scale first, unlike the blocks)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x_BTD: Tensor, temb_BD: Tensor) -> Tensor:
        scale_B1D, shift_B1D = self.linear(F.silu(temb_BD))[:, None].chunk(2, dim=-1)
        return modulate(x_BTD, shift_B1D, scale_B1D)


class QwenImage(nn.Module):
    """forward(x_BCHW, sigma_B, text_BLD, mask_BL, guidance_B=None, span_B=None, adapted=True) -> what the head returns.

    sigma is the noise level in [0, 1] (diffusers' timestep / 1000); mask is boolean over the padded text, or None;
    guidance is the scale, for models with guidance_embeds and only for these; span is the part of sigma that the step covers, for
    heads that take it and only for these; adapted switches adapters on (models/lora.py).
    recompute_every: blocks whose activations are computed again for the backward pass instead of kept: every n-th, 0 for none.
    adaptable: what the names of layers that may have adapters begin with; norm_out and the head are trained in full instead.
    leaf_modules: what a sharding engine should gather as one piece; parallel/tensor.py says how their linears may be split.
    """

    adaptable = ("transformer_blocks.", "time_text_embed.", "img_in", "txt_in")
    leaf_modules = (Block,)
    recompute_every = 0

    def __init__(self, config: ModelConfig, head: nn.Module):
        super().__init__()
        width = config.width
        self.axes = tuple(config.axes_dims_rope)
        self.time_text_embed = TimestepEmbedder(width, config.guidance_embeds, head.takes_span)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.img_in = nn.Linear(config.latent_channels * PATCH * PATCH, width)
        self.txt_in = nn.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_attention_heads, config.attention_head_dim) for _ in range(config.num_layers)
        )
        self.norm_out = FinalNorm(width)
        self.head = head
        # Nothing reads the text tokens that leave the last block: these never get a gradient.
        for name, parameter in self.named_parameters():
            if name in self.unread:
                parameter.requires_grad_(False)

    def forward(
        self,
        x_BCHW: Tensor,
        sigma_B: Tensor,
        text_BLD: Tensor,
        mask_BL: Tensor | None,
        guidance_B: Tensor | None = None,
        span_B: Tensor | None = None,
        adapted: bool = True,
    ) -> Tensor | dict[str, Tensor]:
        dtype, (H, W) = self.txt_norm.weight.dtype, x_BCHW.shape[-2:]
        image_BTD = apply_linear(self.img_in, pack(x_BCHW.to(dtype)), adapted)
        text_BLD = apply_linear(self.txt_in, self.txt_norm(text_BLD.to(dtype)), adapted)
        temb_BD = self.time_text_embed(sigma_B, guidance_B, dtype, adapted, span_B)
        rotary_SE = rotary_angles(H // PATCH, W // PATCH, text_BLD.shape[1], self.axes, x_BCHW.device)
        mask_B11S = None if mask_BL is None else F.pad(mask_BL, (0, image_BTD.shape[1]), value=True)[:, None, None]
        for index, block in enumerate(self.transformer_blocks):
            # Positional arguments: the hooks of DeepSpeed on whole blocks do not see others, and free weights too early.
            inputs = (image_BTD, text_BLD, mask_B11S, temb_BD, rotary_SE, adapted)
            if torch.is_grad_enabled() and self.recompute_every and index % self.recompute_every == 0:
                image_BTD, text_BLD = recomputed(block, *inputs)
            else:
                image_BTD, text_BLD = block(*inputs)
        norm_out, head = self.output(adapted)
        return head(norm_out(image_BTD, temb_BD), temb_BD, (H, W))

    @property
    def unread(self) -> set[str]:
        return unread_parameters(len(self.transformer_blocks))

    def output(self, adapted: bool) -> tuple[nn.Module, nn.Module]:
        """The final norm and head of a pass."""
        return self.norm_out, self.head


def recomputed(block: Block, image_BTD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The block, without its activations kept for the backward pass.

    Reentrant: the other kind of checkpointing fails with modules that ZeRO-3 gathers as one piece. It differentiates only
    where an input asks for it, which a frozen embedding of the image does not.
    """
    if not image_BTD.requires_grad:
        image_BTD = image_BTD.detach().requires_grad_()
    return checkpoint(block, image_BTD, *others, use_reentrant=True)


def unread_parameters(num_layers: int) -> set[str]:
    """Parameters that published checkpoints have and no output depends on."""
    layers = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    return {f"transformer_blocks.{num_layers - 1}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


class TiedQwenImage(QwenImage):
    """Teacher and student on one frozen trunk: with adapters the student, without them the teacher.

    Only the adapters, the student's final norm and its head are trained; the teacher keeps its own norm and head.
    """

    def __init__(self, config: ModelConfig, head: nn.Module):
        super().__init__(config, head)
        self.teacher_norm_out = FinalNorm(config.width)
        self.teacher_head = VelocityHead(config.width, config.latent_channels)

    def output(self, adapted: bool) -> tuple[nn.Module, nn.Module]:
        return (self.norm_out, self.head) if adapted else (self.teacher_norm_out, self.teacher_head)


def build_teacher(config: ModelConfig, seed: int) -> QwenImage:
    """A randomly initialised teacher that starts as the zero velocity field: modulations and output projection are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QwenImage(config, VelocityHead(config.width, config.latent_channels))
    modulations = [layer for block in model.transformer_blocks for layer in (block.img_mod[1], block.txt_mod[1])]
    with torch.no_grad():
        for linear in (*modulations, model.norm_out.linear, model.head.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


def plan_model(config: ModelConfig, policy: PolicyConfig | None = None) -> QwenImage:
    """A teacher, or with a policy a student, on the meta device: shapes without weights."""
    width, channels = config.width, config.latent_channels
    with torch.device("meta"):
        head = VelocityHead(width, channels) if policy is None else build_policy_head(width, channels, policy)
        return QwenImage(config, head)


def plan_student(
    config: ModelConfig, policy: PolicyConfig, teacher: WeightSource, seed: int
) -> tuple[QwenImage, WeightSource]:
    """A student on the meta device and the weights it starts from: the teacher's, and a head made from its output layer."""
    head = initial_head(config, policy, teacher, seed)
    return plan_model(config, policy), OverlaidWeights(head, without_head(teacher))


def shape_tied(config: ModelConfig, policy: PolicyConfig, lora: LoraConfig) -> TiedQwenImage:
    """Teacher and student on one trunk, on the meta device. All is frozen but the student's own."""
    with torch.device("meta"):
        model = TiedQwenImage(config, build_policy_head(config.width, config.latent_channels, policy))
        add_adapters(model, lora)
    for module in (model.norm_out, model.head, model.time_text_embed.span_embedder):
        if module is not None:
            module.requires_grad_(True)
    return model


def plan_tied(
    config: ModelConfig, policy: PolicyConfig, lora: LoraConfig, teacher: WeightSource, seed: int
) -> tuple[TiedQwenImage, WeightSource]:
    """shape_tied, and the weights it starts from."""
    head, model = initial_head(config, policy, teacher, seed), shape_tied(config, policy, lora)
    names = {name: base_name(name) for name, _ in model.named_parameters()}
    own = {"head.": "teacher_head.", "norm_out.": "teacher_norm_out."}
    names |= {
        new + name.removeprefix(old): name
        for name in teacher.shapes()
        for old, new in own.items()
        if name.startswith(old)
    }
    below = RenamedWeights(teacher, {new: name for new, name in names.items() if not new.startswith("head.")})
    return model, OverlaidWeights(head, OverlaidWeights(InitialAdapters(model, seed), below))


def initial_head(config: ModelConfig, policy: PolicyConfig, teacher: WeightSource, seed: int) -> TensorWeights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_policy_head(config.width, config.latent_channels, policy)
        output = VelocityHead(config.width, config.latent_channels)
        fresh = embedder(config.width)
    output.load_state_dict({name: teacher.view(f"head.{name}")[:].float() for name in output.state_dict()})
    head.init_from_teacher(output, torch.Generator().manual_seed(seed))
    weights = {f"head.{name}": value for name, value in head.state_dict().items()}
    if head.takes_span:
        # A segment's length changes nothing at first: the student starts as the teacher, whatever the length.
        torch.nn.init.zeros_(fresh.linear_2.weight)
        torch.nn.init.zeros_(fresh.linear_2.bias)
        weights |= {f"time_text_embed.span_embedder.{name}": value for name, value in fresh.state_dict().items()}
    return TensorWeights(weights, "a fresh policy head")


def without_head(source: WeightSource) -> WeightSource:
    return RenamedWeights(source, {name: name for name in source.shapes() if not name.startswith("head.")})


def build_student(teacher: QwenImage, config: ModelConfig, policy: PolicyConfig, seed: int) -> QwenImage:
    """The untrained student of a teacher that is in memory."""
    model, start = plan_student(config, policy, TensorWeights(teacher.state_dict(), "the teacher"), seed)
    fill(model, start)
    return model
