"""Of the network: its shape, the noise schedule, the policy that its head describes, adapters."""

from dataclasses import dataclass, field

from piflow_dist.config.checks import require, require_choice, require_positive

ARCHITECTURES = ("qwen_image", "flux", "dit")
"""Of models/architecture.py; docs/new_model.md adds one."""


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of a transformer; the names are diffusers'. The defaults are Qwen-Image's."""

    architecture: str = "qwen_image"
    """qwen_image, flux (double and single blocks, pooled prompt) or dit (class labels)."""
    num_layers: int = 60
    num_single_layers: int = 0
    """flux: blocks on text and image tokens in one stream, after the num_layers double ones."""
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    latent_channels: int = 16
    """Channels of the codec's latent. The transformer sees 2 x 2 patches of it."""
    joint_attention_dim: int = 3584
    """Width of the prompt embeddings; of class labels, which are one-hot vectors: their number and one for none."""
    pooled_projection_dim: int = 0
    """flux: width of the pooled prompt, the first numbers of an embedding's first row."""
    axes_dims_rope: list[int] = field(default_factory=lambda: [16, 56, 56])
    """Channels of a head that turn with the frame, the row and the column; [] for dit, whose tokens know their place."""
    time_scale: float = 1000.0
    """dit: the network reads the noise level times this. 1 for SiT and REPA, 1000 for others."""
    norm_eps: float = 1e-6
    """dit: of the norm before an MLP (all others have 1e-6). 1e-5 in LakonLab's class, unless its config.json says another."""
    guidance_embeds: bool = False
    """The guidance scale is an input of the network: a guidance-distilled teacher (as FLUX.1-dev is), and its student."""

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self):
        require_positive("model", self, "num_layers", "num_attention_heads", "attention_head_dim", "latent_channels")
        require_choice("model.architecture", self.architecture, ARCHITECTURES)
        match self.architecture:
            case "qwen_image":
                self.check_rotations()
            case "flux":
                self.check_rotations()
                require_positive("model", self, "num_single_layers", "pooled_projection_dim")
                require(
                    self.pooled_projection_dim <= self.joint_attention_dim,
                    f"model.pooled_projection_dim={self.pooled_projection_dim} exceeds model.joint_attention_dim="
                    f"{self.joint_attention_dim}, but the pooled prompt is a row of the prompt's embedding.",
                )
            case "dit":
                require_positive("model", self, "time_scale", "norm_eps")
                require(
                    not self.axes_dims_rope and self.width % 4 == 0,
                    f"model.axes_dims_rope={list(self.axes_dims_rope)}, width {self.width}: model.architecture=dit adds fixed "
                    "positions, a quarter of the width for each sine and cosine. Set model.axes_dims_rope=[] and a multiple of 4.",
                )
                require(
                    not self.guidance_embeds,
                    "model.guidance_embeds=true: model.architecture=dit has no such input. Set it to false.",
                )

    def check_rotations(self) -> None:
        rope = sum(self.axes_dims_rope)
        require(
            len(self.axes_dims_rope) == 3 and rope == self.attention_head_dim,
            f"model.axes_dims_rope={list(self.axes_dims_rope)} sums to {rope}, but a head has "
            f"model.attention_head_dim={self.attention_head_dim} dimensions. Give three even numbers of that sum.",
        )
        require(
            all(axis % 2 == 0 for axis in self.axes_dims_rope),
            f"model.axes_dims_rope={list(self.axes_dims_rope)}: rotations act on pairs, every entry must be even.",
        )


@dataclass(kw_only=True)
class ScheduleConfig:
    """sigma = warp(tau), in flow/schedule.py."""

    shift: float = 3.2
    dynamic: bool = False
    """Compute the shift from the number of image tokens instead (log-linear, 0.5 at 256 to 1.15 at 4,096 tokens)."""

    def __post_init__(self):
        require_positive("schedule", self, "shift")


@dataclass(kw_only=True)
class PolicyConfig:
    type: str = "gmflow"
    """gmflow (Gaussian mixture), dx (clean images on a time grid) or mean (one velocity for the whole segment: the baselines)."""
    num_components: int = 8
    """K of a GMFlow policy."""
    logstd_inner_dim: int = 1024
    num_nodes: int = 10
    """N of a DX policy."""
    mode: str = "grid"
    """DX: grid or polynomial."""

    def __post_init__(self):
        require_choice("policy.type", self.type, ("gmflow", "dx", "mean"))
        require_choice("policy.mode", self.mode, ("grid", "polynomial"))
        require_positive("policy", self, "num_components", "logstd_inner_dim")
        require(
            self.type == "dx" or self.mode == "grid",
            f"policy.mode={self.mode} is of DX policies, this one has policy.type={self.type}. Set policy.type=dx.",
        )
        require(self.num_nodes >= 2, f"policy.num_nodes={self.num_nodes} spans no interval. Use 2 or more.")


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters of mode=tied; the defaults are the published ones of Qwen-Image."""

    rank: int = 256
    alpha: float = 256.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.05
    targets: list[str] = field(
        default_factory=lambda: [
            r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
            r"time_text_embed\.timestep_embedder\.linear_[12]",
        ]
    )
    """Regular expressions for whole names of linear layers. The last block's text MLP, which nothing reads, is left out."""

    def __post_init__(self):
        require_positive("lora", self, "rank", "alpha")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must lie in [0, 1).")
        require(bool(self.targets), "lora.targets is empty: nothing but the head would learn. Name linear layers.")
