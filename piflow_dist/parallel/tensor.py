"""Tensor parallelism: a transformer's plan (models/) says which of its layers are split over a tensor-parallel group, and how.

A column layer holds rows of its weight (outputs), a row layer columns (inputs); between the two nothing is communicated. What
the plan does not name is replicated: its gradients agree on all ranks of the group because everything that reads it does.

Every split parameter is marked (tensor_model_parallel, partition_dim): the gradient norm counts it on every rank, and a
replicated one only once. Imported where parallel.tp > 1 only: Megatron takes seconds to import.
"""

import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from piflow_dist.models.derivative import differentiating
from piflow_dist.models.lora import LoraLinear
from piflow_dist.models.transformer import Rule, Split, Transformer


def split_dim(name: str, plan: tuple[Rule, ...]) -> int | None:
    """Along which dimension the plan splits the parameter of this name; None: it is replicated."""
    layer, _, kind = name.rpartition(".")
    layer, _, adapter = layer.rpartition(".") if layer.endswith((".lora_A", ".lora_B")) else (layer, "", "")
    layer = layer.removesuffix(".base_layer")
    split = next((rule.split for rule in plan if re.fullmatch(rule.pattern, layer)), None)
    if split in ("column", "column, joined"):
        return None if adapter == "lora_A" else 0
    if split == "row":
        return 1 if kind == "weight" and adapter != "lora_B" else None
    return None


class PlanError(ValueError):
    """The plan does not fit the model, or the group's size does not divide it."""


def split_layers(model: Transformer, group: dist.ProcessGroup) -> None:
    """Replace the layers that the model's plan names by this rank's part of them, in place, weights included.

    Parameter names stay as they are. Raises PlanError for a rule that matches nothing and for sizes that the group does
    not divide, before anything is replaced.
    """
    matches = {
        rule: [name for name, _ in model.named_modules() if re.fullmatch(rule.pattern, name)] for rule in model.plan
    }
    for rule, names in matches.items():
        if not names:
            raise PlanError(f"The tensor-parallel plan's rule {rule.pattern!r} matches no layer of this model.")
    for rule, names in matches.items():
        for name in names:
            split_layer(model, name, rule.split, group)


def split_layer(model: nn.Module, name: str, split: Split, group: dist.ProcessGroup) -> None:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    reads_shared = any(isinstance(hook, SharedInput) for hook in parent._forward_pre_hooks.values())
    if isinstance(module, LoraLinear):
        split_adapter(name, module, split, group, reads_shared)
        module, name = module.base_layer, f"{name}.base_layer"
    match split:
        case "shared input":
            module.register_forward_pre_hook(SharedInput(group))
        case "partial norm":
            model.set_submodule(name, PartialNorm(module, group))
        case "column" | "column, joined":
            model.set_submodule(name, ColumnLinear(name, module, group, split == "column, joined", reads_shared))
        case "row":
            model.set_submodule(name, RowLinear(name, module, group))


def split_adapter(name: str, adapter: LoraLinear, split: Split, group: dist.ProcessGroup, reads_shared: bool) -> None:
    """B follows the rows of a column layer, A the columns of a row layer; the other one is replicated.

    Both are where the layer's channels are joined: what is added to them is whole, and so is its gradient.
    """
    if split == "column":
        rows = share(adapter.lora_B.out_features, group, name)
        adapter.lora_B.weight = split_parameter(adapter.lora_B.weight, 0, rows)
        if reads_shared:  # the input's gradient is summed elsewhere: here it must stay a part, and A's must not
            adapter.lora_A = PartialLinear(adapter.lora_A, group)
        else:
            adapter.join = CopyTo(group)
    elif split == "row":
        adapter.in_channels = share(adapter.in_features, group, name)
        adapter.lora_A.weight = split_parameter(adapter.lora_A.weight, 1, adapter.in_channels)
        adapter.join = ReduceFrom(group)


def split_parameter(whole: nn.Parameter, dim: int, part: slice) -> nn.Parameter:
    index = (part,) if dim == 0 else (slice(None), part)
    parameter = nn.Parameter(whole.detach()[index].clone(), whole.requires_grad)
    mark(parameter, dim)
    return parameter


def copy_to_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity whose gradient is summed over the group. (Megatron's functions have no forward-mode derivative.)"""
    return x if differentiating() else copy_to_tensor_model_parallel_region(x, group)


def sum_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, whose gradient is the same for all ranks."""
    return Sum.apply(x, group) if differentiating() else reduce_from_tensor_model_parallel_region(x, group)


class CopyTo(nn.Module):
    """Identity whose gradient is summed over the group: every rank goes on with its own channels."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return copy_to_group(x, self.group)


class ReduceFrom(CopyTo):
    """Sum over the group, whose gradient is the same for all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return sum_over_group(x, self.group)


def share(size: int, group: dist.ProcessGroup, name: str) -> slice:
    """This rank's part of `size` channels."""
    if size % group.size():
        raise PlanError(
            f"parallel.tp={group.size()} does not divide the {size} channels of {name}. Choose another parallel.tp."
        )
    part = size // group.size()
    return slice(group.rank() * part, (group.rank() + 1) * part)


def mark(parameter: nn.Parameter, dim: int) -> None:
    """As split along `dim`. Megatron marks the weights that it initialises, and these are loaded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def megatron_config(dtype: torch.dtype) -> ModelParallelConfig:
    # Without "CPU initialization" Megatron allocates on the current CUDA device, with or without one.
    return ModelParallelConfig(params_dtype=dtype, use_cpu_initialization=True, perform_initialization=False)


def no_init(weight: Tensor) -> Tensor:
    return weight


@torch.no_grad()
def take(parameter: nn.Parameter, whole: nn.Parameter, part: tuple[slice, ...]) -> None:
    parameter.requires_grad_(whole.requires_grad)
    if not whole.is_meta:
        parameter.copy_(whole[part])


class ColumnLinear(ColumnParallelLinear):
    """Rows of a linear layer's weight. Returns this rank's output channels, or all of them where they are joined."""

    def __init__(self, name: str, linear: nn.Linear, group: dist.ProcessGroup, joined: bool, reads_shared: bool):
        with torch.device(linear.weight.device):
            super().__init__(
                linear.in_features,
                linear.out_features,
                config=megatron_config(linear.weight.dtype),
                init_method=no_init,
                disable_grad_reduce=reads_shared,
                tp_group=group,
            )
        rows = share(linear.out_features, group, name)
        for parameter, whole in ((self.weight, linear.weight), (self.bias, linear.bias)):
            mark(parameter, 0)
            take(parameter, whole, (rows,))
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias) if differentiating() else super().forward(x)[0]
        return Join.apply(y, self.tp_group) if self.joined else y


class RowLinear(RowParallelLinear):
    """Columns of a linear layer's weight: reads this rank's channels, returns the sum over the group."""

    def __init__(self, name: str, linear: nn.Linear, group: dist.ProcessGroup):
        with torch.device(linear.weight.device):
            super().__init__(
                linear.in_features,
                linear.out_features,
                config=megatron_config(linear.weight.dtype),
                init_method=no_init,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=group,
            )
        columns = share(linear.in_features, group, name)
        mark(self.weight, 1)
        take(self.weight, linear.weight, (slice(None), columns))
        take(self.bias, linear.bias, (slice(None),))

    def forward(self, x: Tensor) -> Tensor:
        if differentiating():
            return Sum.apply(F.linear(x, self.weight), self.tp_group) + self.bias
        return super().forward(x)[0]


class PartialNorm(nn.Module):
    """RMS norm over a head's channels, applied to this rank's heads; the weight's gradient is summed over the group."""

    def __init__(self, norm: nn.RMSNorm, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_group(self.weight, self.group)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class PartialLinear(nn.Module):
    """A replicated linear layer that each rank reads for its own channels; the weight's gradient is summed over the group."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.group = linear.weight, group

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, copy_to_group(self.weight, self.group))


class SharedInput:
    """Forward pre-hook: the gradients of the tokens that come in (real numbers, unlike masks and rotations) are summed over the group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        return tuple(copy_to_group(x, self.group) if is_real(x) else x for x in inputs)


def is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Join(torch.autograd.Function):
    """All ranks' channels from each rank's, in the order of ranks. Megatron's own gather needs a CUDA device.

    What follows is computed alike on all ranks, so a rank's gradient is its own part of it.
    """

    @staticmethod
    def forward(ctx, y: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN001 (torch's context)
        ctx.group = group
        parts = [torch.empty_like(y) for _ in range(group.size())]
        dist.all_gather(parts, y.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return grad.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _: None) -> Tensor:  # noqa: ANN001
        return Join.forward(ctx, tangent, ctx.group)


class Sum(torch.autograd.Function):
    """Sum over the group, of values and of their forward-mode derivatives."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN001
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def jvp(ctx, tangent: Tensor, _: None) -> Tensor:  # noqa: ANN001
        return Sum.forward(ctx, tangent, ctx.group)
