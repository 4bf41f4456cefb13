"""What every architecture has in common, and what its file has to say: docs/new_model.md writes one.

B batch, C latent channels, H W latent size, T image tokens, L text tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piflow_dist.config import ModelConfig
from piflow_dist.models.heads import VelocityHead
from piflow_dist.models.layers import TIME_CHANNELS, FinalNorm, at_least_float32, embedder, sinusoids, two_layers
from piflow_dist.models.weights import View

SPAN_SCALE = 0.02
"""Of a segment's length before its sinusoids, the fastest of which then turns 20 radians over a trajectory. MeanFlow's target holds
their derivative, which would be fifty times as large at the noise level's own scale."""

Split = Literal["column", "column, joined", "row", "partial norm", "shared input"]


@dataclass(frozen=True)
class Rule:
    """Under tensor parallelism, modules whose whole name matches `pattern` (a regular expression) are split in this way."""

    pattern: str
    split: Split


@dataclass(frozen=True)
class Published:
    """How the published students of an architecture are sampled, for folders that do not say it. The defaults are Qwen-Image's."""

    nfe: int = 4
    final_step_size_scale: float = 0.5
    shift: float = 3.2
    guidance: float = 4.0


class Transformer(nn.Module):
    """forward(x_BCHW, sigma_B, text_BLD, mask_BL, guidance_B=None, span_B=None, *, adapted=True) -> what the head returns.

    sigma is the noise level in [0, 1]; text is the prompt's embedding; mask is boolean over the padded text, or None;
    guidance is the scale, for models with guidance_embeds and only for these; span is the part of sigma that the step covers, for
    heads that take it and only for these; adapted switches adapters on (models/lora.py).

    A subclass's __init__(config, head, tied=False) makes its layers, then calls add_output. tied: teacher and student on one
    frozen trunk. With adapters it is the student, without them the teacher, which keeps a final norm and head of its own.
    """

    plan: ClassVar[tuple[Rule, ...]]
    """How parallel/tensor.py may split the layers."""
    adaptable: ClassVar[tuple[str, ...]]
    """What the names of layers that may have adapters begin with; norm_out and the head are trained in full instead."""
    image_layer: ClassVar[str]
    """The layer that makes tokens of the image: whole weights have it, an adapter's folder has not."""
    leaf_modules: ClassVar[tuple[type[nn.Module], ...]]
    """Blocks: what a sharding engine should gather as one piece."""
    depths: ClassVar[tuple[str, ...]] = ("num_layers",)
    """The fields of ModelConfig that count blocks of each kind, in the order of the blocks."""
    usual: ClassVar[tuple[tuple[int, int], int]] = ((128, 128), 512)
    """Latent size and text length that plans assume where there is no data."""
    published: ClassVar[Published] = Published()
    channels_last: ClassVar[bool] = False
    """Of the head's outputs for a patch: pixels before channels, as DiT has them, or channels before pixels."""
    shift_first: ClassVar[bool] = False
    """Order of the final norm's two halves."""
    packed: ClassVar[bool] = True
    """config.json counts the channels of 2 x 2 patches, not the latent's."""
    classes: ClassVar[tuple[str, str, str]]
    """_class_name in the config.json of a teacher, of a GMFlow student and of a DX student."""
    other_classes: ClassVar[tuple[str, ...]] = ()
    """_class_name of teachers in further layouts, which from_published reads too."""
    teacher_keys: ClassVar[tuple[str, ...]]
    """What a teacher's config.json must say."""

    recompute_every = 0
    """Blocks whose activations are computed again for the backward pass instead of kept: every n-th, 0 for none."""

    def add_output(self, config: ModelConfig, head: nn.Module, tied: bool) -> None:
        self.norm_out, self.head = FinalNorm(config.width, self.shift_first), head
        self.span_embedder = embedder(TIME_CHANNELS, config.width) if head.takes_span else None
        if tied:
            self.teacher_norm_out = FinalNorm(config.width, self.shift_first)
            self.teacher_head = VelocityHead(config.width, config.latent_channels, self.channels_last)
        self.tied, self.unread = tied, self.unread_of(config)
        for name, parameter in self.named_parameters():
            if name in self.unread:
                parameter.requires_grad_(False)

    def add_span(self, temb_BD: Tensor, span_B: Tensor | None, adapted: bool) -> Tensor:
        """The time embedding, and that of the segment's length for heads that take it. A teacher's pass (adapted=False) has none."""
        if (span_B is None) != (self.span_embedder is None or not adapted):
            raise ValueError(
                f"span_B is {'missing' if span_B is None else 'given'}, but this pass is of a "
                f"{'student that takes it' if span_B is None else 'network that does not take it'} (policy.type=mean does)."
            )
        if span_B is None:
            return temb_BD
        waves = sinusoids(1000 * SPAN_SCALE * at_least_float32(span_B)).to(temb_BD.dtype)
        return temb_BD + two_layers(self.span_embedder, waves, adapted)

    def output(self, adapted: bool) -> tuple[nn.Module, nn.Module]:
        """The final norm and head of a pass."""
        if self.tied and not adapted:
            return self.teacher_norm_out, self.teacher_head
        return self.norm_out, self.head

    def all_blocks(self) -> list[nn.Module]:
        """In the order in which they are computed."""
        return [module for module in self.modules() if isinstance(module, self.leaf_modules)]

    def run_block(self, index: int, block: nn.Module, *inputs: Any) -> Any:
        """Block number `index`. Positional arguments: the hooks of DeepSpeed on whole blocks do not see others."""
        if torch.is_grad_enabled() and self.recompute_every and index % self.recompute_every == 0:
            return recomputed(block, *inputs)
        return block(*inputs)

    def zero_at_first(self) -> list[nn.Linear]:
        """Modulation layers, which are zero in an untrained teacher, so that each of its blocks is the identity."""
        raise NotImplementedError

    @classmethod
    def unread_of(cls, config: ModelConfig) -> set[str]:
        """Parameters that published checkpoints have and no output depends on: they never get a gradient."""
        return set()

    # Files: folders with config.json and safetensors, as diffusers and LakonLab write them.

    @classmethod
    def shape_json(cls, config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the shape, in a teacher's folder and a student's."""
        raise NotImplementedError

    @classmethod
    def teacher_json(cls, config: ModelConfig) -> dict[str, Any]:
        """What a teacher's config.json says besides."""
        return {}

    @classmethod
    def read_shape(cls, found: dict[str, Any]) -> ModelConfig:
        """The inverse of shape_json. Raises KeyError for what is missing."""
        raise NotImplementedError

    @classmethod
    def check_teacher(cls, where: str, found: dict[str, Any]) -> None:
        """Raise ConfigError for variants of the architecture that this one is not."""

    @classmethod
    def predicts_more(cls, found: dict[str, Any]) -> bool:
        """Whether a config.json with the teacher's class describes a DX student, published with N times the outputs."""
        return False

    @classmethod
    def from_published(cls, views: Mapping[str, View], config: ModelConfig, found: dict[str, Any]) -> dict[str, View]:
        """Published tensors by our names. found: the folder's config.json."""
        return {our_name(name): view for name, view in views.items()}

    @classmethod
    def to_published(cls, name: str, value: Tensor, config: ModelConfig) -> Tensor:
        """Our tensor as it is published."""
        return value

    @classmethod
    def published_name(cls, name: str) -> str:
        return name.removeprefix("head.")


def our_name(name: str) -> str:
    """Output projections, a teacher's and a policy's, are the head here."""
    return f"head.{name}" if name.startswith("proj_out") else name


def recomputed(block: nn.Module, image_BTD: Tensor, *others: Any) -> Any:
    """The block, without its activations kept for the backward pass.

    Reentrant: the other kind of checkpointing fails with modules that ZeRO-3 gathers as one piece. It differentiates only
    where an input asks for it, which a frozen embedding of the image does not.
    """
    if not image_BTD.requires_grad:
        image_BTD = image_BTD.detach().requires_grad_()
    return checkpoint(block, image_BTD, *others, use_reentrant=True)
