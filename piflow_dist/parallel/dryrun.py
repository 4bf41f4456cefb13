"""The dry run: rank r of the real job, on one CPU, without its weights and without the other ranks.

The model is on the meta device, split by the real tensor-parallel plan over a group of a fake backend; what ZeRO-3 will
hold of it follows from its arithmetic, to the byte. A step is the real objective's code: the network runs on the meta device at full
size, the policy (whose substeps depend on values) on the CPU at a smaller latent, and parallel/tracker.py counts.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from piflow_dist.config import Config
from piflow_dist.distill.baselines import meanflow_step, shortcut_step
from piflow_dist.distill.objectives import (
    Batch,
    build_schedule,
    flow_matching_step,
    imitation_data_step,
    imitation_datafree_step,
)
from piflow_dist.models.architecture import architecture, plan_model, shape_tied
from piflow_dist.models.derivative import forward_derivative
from piflow_dist.models.lora import LoraLinear
from piflow_dist.models.transformer import Transformer
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.tracker import Messages, Peak, Record, Tracker, fused_attention, whole_attention
from piflow_dist.parallel.zero import DTYPES

SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3 sub_group_size: the optimizer updates a rank's shards in pieces of about this many elements."""
POLICY_SIDE = 8
"""The policy is followed on latents of at most this side; what it needs is proportional to the number of pixels."""


@contextmanager
def fake_world(world_size: int, rank: int, tp: int) -> Iterator[Topology]:
    """Rank `rank` of a world that does not exist. Messages go nowhere. One at a time in a process without a real world."""
    topology = Topology(rank, world_size, rank, torch.device("meta"), tp)
    if tp == 1:
        yield topology
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401  (collectives of tensors on the meta device)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from piflow_dist.parallel.groups import parallel_state, start_groups

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        start_groups(tp, timedelta(seconds=60))
        yield topology
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Models:
    """This rank's slices, on the meta device in the run's dtype. frozen: a teacher beside the student (mode=full)."""

    trained: Transformer
    frozen: Transformer | None


def build_models(config: Config, topology: Topology) -> Models:
    frozen = None
    if config.mode == "tied":
        trained = shape_tied(config.model, config.policy, config.lora)
    elif config.distils:
        trained, frozen = plan_model(config.model, config.policy), plan_model(config.model).requires_grad_(False).eval()
    else:
        trained = plan_model(config.model)
    trained.recompute_every = config.parallel.recompute_every
    for module in (trained, frozen):
        if module is not None:
            module.to(DTYPES[config.train.dtype])
            if topology.tp > 1:
                from piflow_dist.parallel.tensor import split_layers

                split_layers(module, topology.mpu.get_tensor_model_parallel_group())
    return Models(trained, frozen)


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds between steps, in bytes. All ranks hold the same: ZeRO-3 pads every parameter to equal shards."""

    weights: int
    """ZeRO-3 shards of all engines, in train.dtype."""
    kept_whole: int
    """Small parameters that every rank keeps whole, beside their shards."""
    masters: int
    """fp32 weights of what is trained: a copy also where training is in fp32."""
    optimizer: int
    ema: int
    gradients: int
    """The buffer in which gradients add up."""
    update: int
    """Gradient and temporary of the largest piece that the optimizer updates at once."""
    gathered: int
    """The largest transformer block, which is gathered as one piece (0 where nothing is shared out)."""
    linears_gathered: int
    """Linear weights of all blocks: what parallel.memory_efficient_linear=false keeps gathered until the backward pass."""
    student_pass: int
    """Gathered by one pass through the trained model. Like this rank's slice of it, but without what is kept whole."""
    teacher_pass: int
    trained_slice: int
    """Elements of this tensor-parallel rank's slice that are trained."""
    trained_whole: int
    """Elements that are trained, of the whole model."""
    trained_shard: int
    """Elements of this rank's shards that are trained, padding included."""
    matrices_shard: int
    """Of these, elements of what Muon updates."""


def rank_bytes(config: Config, models: Models, topology: Topology) -> RankBytes:
    parallel, dp, size = config.parallel, topology.dp_size, DTYPES[config.train.dtype].itemsize

    def shards(parameters: list[nn.Parameter]) -> int:
        return sum(-(-p.numel() // dp) for p in parameters)

    def large(module: nn.Module) -> int:
        return size * sum(p.numel() for p in module.parameters() if p.numel() > parallel.persistence_threshold)

    modules = [module for module in (models.trained, models.frozen) if module is not None]
    everything = [p for module in modules for p in module.parameters()]
    trained = {name: p for name, p in models.trained.named_parameters() if p.requires_grad}
    muon = config.optim.type == "muon"
    matrices = [p for name, p in trained.items() if muon and p.dim() >= 2 and "embed" not in name.lower()]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained.values() if id(p) not in chosen]
    count, matrices_count = shards(list(trained.values())), shards(matrices)
    moments = {"adamw": 8, "muon": 8, "sgd": 4 if config.optim.momentum else 0}[config.optim.type]
    blocks = models.trained.all_blocks()
    return RankBytes(
        weights=size * shards(everything),
        kept_whole=size * sum(p.numel() for p in everything if p.numel() <= parallel.persistence_threshold) * (dp > 1),
        masters=4 * count,
        optimizer=moments * (count - matrices_count) + size * matrices_count,  # Muon's momentum has the messages' dtype
        ema=4 * count,
        gradients=4 * count,
        update=8 * max(largest_piece(matrices, dp), largest_piece(others, dp)),
        gathered=max(large(block) for block in blocks) * (dp > 1),
        linears_gathered=sum(large(block) for block in blocks) * (dp > 1),
        student_pass=large(models.trained) * (dp > 1),
        teacher_pass=large(modules[-1]) * (dp > 1) * config.distils,
        trained_slice=sum(p.numel() for p in trained.values()),
        trained_whole=sum(
            p.numel() * (topology.tp if getattr(p, "tensor_model_parallel", False) else 1) for p in trained.values()
        ),
        trained_shard=count,
        matrices_shard=matrices_count,
    )


def largest_piece(parameters: list[nn.Parameter], dp: int) -> int:
    """Elements of the largest sub-group that DeepSpeed makes of the shards, in their order."""
    largest = piece = 0
    for parameter in parameters:
        piece += -(-parameter.numel() // dp)
        largest = max(largest, piece)
        if piece >= SUB_GROUP_ELEMENTS:
            piece = 0
    return largest


def trace_step(config: Config, topology: Topology, latent: tuple[int, int], text_length: int, step: int) -> Record:
    """One micro-batch of optimiser step `step`: what it holds, computes and sends, besides weights and their gradients.

    Blocks of a kind are alike, so shallow models are followed, one more of them than there are kinds, and the rest is drawn as
    lines through them.
    """
    depths = {name: getattr(config.model, name) for name in architecture(config.model).depths}
    period, shallow = config.parallel.recompute_every or 1, dict(depths)
    for name, depth in depths.items() if uniform(config) else ():
        fewer = depth % period + period
        fewer += period * (
            fewer < 2
        )  # the last block may be unlike the others: nothing reads Qwen-Image's last text tokens
        shallow[name] = depth if fewer + period >= depth else fewer
    first = trace_depth(config, shallow, topology, latent, text_length, step)
    lines = []
    for name, depth in depths.items():
        if shallow[name] < depth:
            deeper = shallow | {name: shallow[name] + period}
            second = trace_depth(config, deeper, topology, latent, text_length, step)
            lines.append((second, (depth - shallow[name]) / period))
    return extrapolate(first, lines)


def uniform(config: Config) -> bool:
    """Whether all blocks of a kind have the same adapters (where something reads their output)."""
    if config.mode != "tied":
        return True
    model = shape_tied(config.model, config.policy, config.lora)
    alike: dict[type[nn.Module], set[str]] = {}
    for prefix, block in model.named_modules():
        if isinstance(block, model.leaf_modules):
            adapted = {name for name, module in block.named_modules() if isinstance(module, LoraLinear)}
            first = alike.setdefault(type(block), adapted)
            if adapted != {name for name in first if f"{prefix}.{name}.weight" not in model.unread}:
                return False
    return True


def trace_depth(
    config: Config, depths: dict[str, int], topology: Topology, latent: tuple[int, int], text_length: int, step: int
) -> Record:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **depths))
    models = build_models(config, topology)
    _, images = config.train.accumulation(topology.dp_size)
    channels, dim = config.model.latent_channels, config.model.joint_attention_dim
    small = tuple(min(side, POLICY_SIDE) for side in latent)
    tracker = Tracker(policy_scale=latent[0] * latent[1] / (small[0] * small[1]))
    for module in (models.trained, models.frozen):
        if module is not None:
            tracker.ignore(module)
    for parameter in models.trained.parameters():
        if parameter.requires_grad:  # ZeRO moves every gradient into its own buffer at once
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    student, teacher = TracedStudent(models.trained, tracker, latent), TracedTeacher(models, tracker, latent)
    schedule = build_schedule(config.schedule, (channels, *latent))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's advice on environment variables
        torch.manual_seed(0)
        with fused_attention(tracker), tracker:
            text_BLD = torch.empty(images, text_length, dim, device="meta")
            mask_BL = torch.empty(images, text_length, device="meta", dtype=torch.bool)
            empty_LD = torch.empty(1, dim, device="meta")
            batch = MetaBatch(torch.randn(images, channels, *small), text_BLD, mask_BL, empty_LD)
            match config.objective:
                case "flow_matching":
                    flow_matching_step(student, batch, config, schedule, 1.0, generator)
                case "imitation":
                    imitation_data_step(student, teacher, batch, config, schedule, step, 1.0, generator)
                case "imitation_datafree":
                    imitation_datafree_step(student, teacher, batch, config, schedule, step, 1.0, generator)
                case "meanflow":
                    meanflow_step(student, teacher, batch, config, schedule, 1.0, generator)
                case "shortcut_regression":
                    shortcut_step(student, teacher, batch, config, schedule, 1.0, generator)
                case unknown:
                    raise ValueError(f"objective={unknown} has no training step.")
    return tracker.record


class MetaBatch(Batch):
    """Images on the CPU, text on the meta device."""

    def without_prompts(self, drop_B: Tensor | None = None) -> Batch:
        return super().without_prompts(None if drop_B is None else drop_B.to("meta"))


def drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


class TracedStudent:
    """What the objectives use of TrainedModel: the network on the meta device, what it returns on a smaller latent."""

    def __init__(self, module: Transformer, tracker: Tracker, latent: tuple[int, int]):
        self.module, self.tracker, self.latent = module, tracker, latent

    def __call__(self, x_BCHW: Tensor, *others: Tensor | None) -> Any:
        with self.tracker.during("student forward"):
            outputs = self.module(*on_meta(x_BCHW, self.latent, others))
        small = x_BCHW.shape[-2:]
        shrunk = tree_map(lambda value: Shrink.apply(value, small, self.tracker), outputs)
        self.tracker.record.kept = max(self.tracker.record.kept, self.tracker.network)
        return shrunk

    def derivative(self, inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Tensor:
        with self.tracker.during("derivative"), whole_attention():
            forward_derivative(
                lambda *values: self.module(*values)["mean"],
                on_meta(inputs[0], self.latent, inputs[1:]),
                on_meta(tangents[0], self.latent, tangents[1:]),
            )
        return torch.randn_like(inputs[0])

    def backward(self, loss: Tensor) -> None:
        with self.tracker.during("backward"):
            loss.backward()


class TracedTeacher:
    """The frozen teacher, or the tied model without its adapters, in the same way."""

    def __init__(self, models: Models, tracker: Tracker, latent: tuple[int, int]):
        self.models, self.tracker, self.latent = models, tracker, latent

    def __call__(self, x_BCHW: Tensor, *others: Tensor | None) -> Tensor:
        inputs = on_meta(x_BCHW, self.latent, others)
        with self.tracker.during("teacher"):
            if self.models.frozen is not None:
                self.models.frozen(*inputs)
            else:
                self.models.trained(*inputs, adapted=False)
        return torch.randn_like(x_BCHW)


def on_meta(x_BCHW: Tensor, latent: tuple[int, int], others: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    moved = [None if value is None else value.to("meta") for value in others]
    return (torch.empty(*x_BCHW.shape[:-2], *latent, device="meta"), *moved)


class Shrink(torch.autograd.Function):
    """A network output on the meta device -> random values on a smaller latent on the CPU; gradients the other way."""

    @staticmethod
    def forward(ctx, whole: Tensor, small: tuple[int, int], tracker: Tracker) -> Tensor:  # noqa: ANN001
        ctx.like, ctx.tracker = (whole.shape, whole.dtype), tracker
        tracker.disown(whole)
        sides = small if whole.shape[-1] > 1 else whole.shape[-2:]
        return torch.randn(*whole.shape[:-2], *sides, dtype=whole.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        shape, dtype = ctx.like
        ctx.tracker.disown(grad)
        return torch.empty(shape, dtype=dtype, device="meta"), None, None


def extrapolate(first: Record, lines: list[tuple[Record, float]]) -> Record:
    """The record at `steps` times the distance from first to each of the others. Everything in it grows linearly with depths."""

    def line(value: float, others: list[float]) -> float:
        return value + sum((other - value) * steps for other, (_, steps) in zip(others, lines, strict=True))

    seconds = [second for second, _ in lines]
    out = Record(kept=line(first.kept, [second.kept for second in seconds]), calls=first.calls)
    for phase, peak in first.peaks.items():
        others = [second.peaks[phase] for second in seconds]
        out.peaks[phase] = Peak(
            line(peak.total, [other.total for other in others]), line(peak.policy, [other.policy for other in others])
        )
    for phase, flops in first.flops.items():
        out.flops[phase] = line(flops, [second.flops[phase] for second in seconds])
    for key, messages in first.messages.items():
        others = [second.messages[key] for second in seconds]
        out.messages[key] = Messages(
            line(messages.count, [other.count for other in others]),
            line(messages.bytes, [other.bytes for other in others]),
        )
    return out
