"""Low-rank adapters on linear layers. Whether they act is an argument of each call, never a flag of the module.

(A block that is recomputed for the backward pass must see what its forward pass saw, and by then a flag would have changed.)
B batch, S tokens, R rank.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_dist.config import ConfigError, LoraConfig
from piflow_dist.models.weights import View, WeightSource, shape_of
from piflow_dist.seeds import seed_from

BLOCK = 256
"""Rows of a merged weight that are made at once."""


class LoraLinear(nn.Module):
    """y = base(x) + alpha/R B A dropout(x). A starts random, B at zero: a fresh adapter changes nothing.

    `in_channels` and `join` are for tensor parallelism, which splits the layers inside: which of the base's input channels
    come in here, and what happens between A and B.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.in_features, self.in_channels = base.in_features, slice(None)
        self.join = nn.Identity()

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        y = self.base_layer(x)
        if not adapted:
            return y
        return y + self.lora_B(self.scale * self.join(self.lora_A(self.drop(x))))  # scaled where it is narrow

    def drop(self, x: Tensor) -> Tensor:
        """Dropout whose mask does not depend on how the channels are shared out."""
        if x.shape[-1] == self.in_features:
            return F.dropout(x, self.dropout, self.training)
        if not self.training or self.dropout == 0:
            return x
        return x * F.dropout(x.new_ones(*x.shape[:-1], self.in_features), self.dropout)[..., self.in_channels]


def apply_linear(layer: nn.Module, x: Tensor, adapted: bool) -> Tensor:
    """A linear layer, with its adapter if it has one and `adapted` says so."""
    return layer(x, adapted) if isinstance(layer, LoraLinear) else layer(x)


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters on the linear layers whose names match config.targets (regular expressions); freeze everything else.

    Layers that nothing reads get none. Raises ConfigError for a target that matches nothing, or layers that are trained in full.
    """
    model.requires_grad_(False)
    for target in config.targets:
        matches = [name for name, _ in model.named_modules() if re.fullmatch(target, name)]
        layers = [name for name in matches if isinstance(model.get_submodule(name), nn.Linear)]
        if not layers:
            detail = f"It matches {matches[0]}, which is no linear layer, or has an adapter. " if matches else ""
            raise ConfigError(
                f"lora.targets: {target!r} matches no linear layer of the model. {detail}"
                f"Names look like {example(model)}."
            )
        whole = [name for name in layers if not name.startswith(model.adaptable)]
        if whole:
            raise ConfigError(
                f"lora.targets: {target!r} matches {whole[0]}, which is trained in full or belongs to the teacher. "
                f"Name layers that begin with {', '.join(model.adaptable)}."
            )
        read = [name for name in layers if f"{name}.weight" not in model.unread]
        if not read:
            raise ConfigError(
                f"lora.targets: {target!r} matches {', '.join(layers)} alone, which no output depends on: nothing would learn. "
                "Name other layers."
            )
        for name in read:
            model.set_submodule(name, LoraLinear(model.get_submodule(name), config))


def example(model: nn.Module) -> str:
    """A target that would match, for messages."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return re.escape([name for name in linears if name.startswith(model.adaptable)][-1])


def base_name(name: str) -> str:
    """The name that a parameter has in a model without adapters."""
    return name.replace(".base_layer.", ".")


class InitialAdapters:
    """Weights of fresh adapters: A normal of standard deviation 1/rank (peft's "gaussian", as published), by name and seed; B zero."""

    origin = "fresh adapters"

    def __init__(self, model: nn.Module, seed: int):
        self.seed = seed
        self.found = {name: tuple(p.shape) for name, p in model.named_parameters() if ".lora_" in name}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.found

    def view(self, name: str) -> Tensor:
        weight = torch.zeros(self.found[name])
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_from(self.seed, name))
            weight.normal_(std=1 / weight.shape[0], generator=generator)
        return weight


class MergedWeights:
    """Weights of a tied student as of a plain one: W + alpha/R B A in fp32 where `trained` has adapters, elsewhere its own or the base's.

    scale: alpha/R. device: where the products are made.
    """

    def __init__(self, trained: WeightSource, base: WeightSource, scale: float, device: torch.device | str = "cpu"):
        self.trained, self.base, self.scale, self.device = trained, base, scale, device
        self.origin = f"{trained.origin} merged into {base.origin}"
        found = trained.shapes()
        self.adapted = {name.replace(".lora_A.", ".") for name in found if ".lora_A." in name}
        self.own = {name for name in found if ".lora_" not in name}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        below = {name: shape for name, shape in self.base.shapes().items() if not name.startswith("head.")}
        return below | {name: shape for name, shape in self.trained.shapes().items() if name in self.own}

    def view(self, name: str) -> View:
        if name not in self.adapted:
            return (self.trained if name in self.own else self.base).view(name)
        layer = name.removesuffix(".weight")
        up, down = (self.trained.view(f"{layer}.lora_{part}.weight")[:] for part in "BA")
        return MergedView(self.base.view(name), up, down, self.scale, self.device)


class MergedView:
    """W + scale B A, read where it is indexed.

    On a CPU the last bits of a product depend on how many rows it has: it is made in blocks of rows whose borders are always the
    same, so that a weight does not depend on who reads which part of it.
    """

    def __init__(self, base: View, up: Tensor, down: Tensor, scale: float, device: torch.device | str):
        self.base, self.up, self.down = base, up.to(device).float(), down.to(device).float()
        self.scale, self.device, self.shape = scale, device, shape_of(base)

    def __getitem__(self, index: Any) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        first, last, _ = rows.indices(self.shape[0])
        begin, down = first - first % BLOCK, self.down[:, columns]
        blocks = [self.up[start : start + BLOCK] @ down for start in range(begin, last, BLOCK)]
        base = self.base[rows, columns].to(self.device).float()
        return base.add(torch.cat(blocks)[first - begin : last - begin], alpha=self.scale)
