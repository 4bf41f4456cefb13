"""Which transformer a configuration means, and models of it: teachers and students, on the meta device or whole."""

import torch
from torch import nn

from piflow_dist.config import LoraConfig, ModelConfig, PolicyConfig
from piflow_dist.models.dit import DiT
from piflow_dist.models.flux import Flux
from piflow_dist.models.heads import DXHead, GMHead, MeanHead, VelocityHead, build_policy_head
from piflow_dist.models.layers import TIME_CHANNELS, embedder
from piflow_dist.models.lora import InitialAdapters, add_adapters, base_name
from piflow_dist.models.qwen_image import QwenImage
from piflow_dist.models.transformer import Transformer
from piflow_dist.models.weights import OverlaidWeights, RenamedWeights, TensorWeights, WeightSource, fill


def architecture(config: ModelConfig) -> type[Transformer]:
    """The class of a configured model: its layers, how they may be split, and how its files are written."""
    return named(config.architecture)


def named(name: str) -> type[Transformer]:
    match name:
        case "qwen_image":
            return QwenImage
        case "flux":
            return Flux
        case "dit":
            return DiT
        case unknown:
            raise ValueError(f"model.architecture={unknown} has no transformer.")


def velocity_head(config: ModelConfig) -> VelocityHead:
    return VelocityHead(config.width, config.latent_channels, architecture(config).channels_last)


def policy_head(config: ModelConfig, policy: PolicyConfig) -> GMHead | DXHead | MeanHead:
    return build_policy_head(config.width, config.latent_channels, policy, architecture(config).channels_last)


def build_teacher(config: ModelConfig, seed: int) -> Transformer:
    """A randomly initialised teacher that starts as the zero velocity field: modulations and output projection are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)(config, velocity_head(config))
    with torch.no_grad():
        for linear in (*model.zero_at_first(), model.norm_out.linear, model.head.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


def plan_model(config: ModelConfig, policy: PolicyConfig | None = None) -> Transformer:
    """A teacher, or with a policy a student, on the meta device: shapes without weights."""
    with torch.device("meta"):
        head: nn.Module = velocity_head(config) if policy is None else policy_head(config, policy)
        return architecture(config)(config, head)


def plan_student(
    config: ModelConfig, policy: PolicyConfig, teacher: WeightSource, seed: int
) -> tuple[Transformer, WeightSource]:
    """A student on the meta device and the weights it starts from: the teacher's, and a head made from its output layer."""
    head = initial_head(config, policy, teacher, seed)
    return plan_model(config, policy), OverlaidWeights(head, without_head(teacher))


def shape_tied(config: ModelConfig, policy: PolicyConfig, lora: LoraConfig) -> Transformer:
    """Teacher and student on one trunk, on the meta device. All is frozen but the student's own."""
    with torch.device("meta"):
        model = architecture(config)(config, policy_head(config, policy), tied=True)
        add_adapters(model, lora)
    for module in (model.norm_out, model.head, model.span_embedder):
        if module is not None:
            module.requires_grad_(True)
    return model


def plan_tied(
    config: ModelConfig, policy: PolicyConfig, lora: LoraConfig, teacher: WeightSource, seed: int
) -> tuple[Transformer, WeightSource]:
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
        head, output = policy_head(config, policy), velocity_head(config)
        span_embedder = embedder(TIME_CHANNELS, config.width)
    output.load_state_dict({name: teacher.view(f"head.{name}")[:].float() for name in output.state_dict()})
    head.init_from_teacher(output, torch.Generator().manual_seed(seed))
    weights = {f"head.{name}": value for name, value in head.state_dict().items()}
    if head.takes_span:
        # A segment's length changes nothing at first: the student starts as the teacher, whatever the length.
        torch.nn.init.zeros_(span_embedder.linear_2.weight)
        torch.nn.init.zeros_(span_embedder.linear_2.bias)
        weights |= {f"span_embedder.{name}": value for name, value in span_embedder.state_dict().items()}
    return TensorWeights(weights, "a fresh policy head")


def without_head(source: WeightSource) -> WeightSource:
    return RenamedWeights(source, {name: name for name in source.shapes() if not name.startswith("head.")})


def build_student(teacher: Transformer, config: ModelConfig, policy: PolicyConfig, seed: int) -> Transformer:
    """The untrained student of a teacher that is in memory."""
    model, start = plan_student(config, policy, TensorWeights(teacher.state_dict(), "the teacher"), seed)
    fill(model, start)
    return model
