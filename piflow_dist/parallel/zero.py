"""DeepSpeed ZeRO-3: engines for a trained and for a frozen model, and a view of their shards by parameter name.

DeepSpeed flattens a rank's shards into a few buffers ("sub-groups"). Checkpoints and EMA work on named pieces of those.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_dist.config import OptimConfig, ParallelConfig
from piflow_dist.models.derivative import forward_derivative
from piflow_dist.models.transformer import Transformer
from piflow_dist.models.weights import WeightSource, check_fits
from piflow_dist.parallel.loading import load_sharded
from piflow_dist.parallel.topology import Topology, partition_dim

BUCKET_ELEMENTS = 100_000_000
"""Gradients wait in a buffer of this many elements to be sent together, and are copied once more on the way: DeepSpeed's default,
five times as large, takes 1.5 GiB more beside a 20B base, and a message of 200 MB fills every link already."""


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    applied: bool
    """False where the gradient was not finite and the weights were left as they were."""
    clipped: bool = False


@dataclass(frozen=True)
class Shard:
    """One parameter's part on this rank: elements [dp_rank * size, (dp_rank + 1) * size) of it, flattened and padded.

    shape is that of this tensor-parallel rank's slice, which is one of tp equal parts along split_dim (None: it is whole).
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None
    size: int
    group: int
    offset: int


def deepspeed_config(optim: OptimConfig | None, parallel: ParallelConfig, dtype: str) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping of DeepSpeed's only: batches are ours
        "managed_gradient_accumulation": False,  # any number of backwards, then one step
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "reduce_scatter": optim is None or optim.type != "muon",  # DeepSpeed's Muon wants whole gradients
            "stage3_param_persistence_threshold": parallel.persistence_threshold,
            "memory_efficient_linear": parallel.memory_efficient_linear,
        },
        "bf16": {"enabled": dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if optim is None:
        return config
    if parallel.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False  # it would compile C++ at first use
    adam = {"betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay, "torch_adam": True}
    if optim.type == "muon":
        muon = {"muon_lr": optim.muon_lr, "adam_lr": optim.lr, "lr": optim.lr, "momentum": optim.momentum}
        config["optimizer"] = {"type": "Muon", "params": {**adam, **muon, "ns_method": "gram"}}
    elif optim.type == "adamw":
        config["optimizer"] = {"type": "AdamW", "params": {**adam, "lr": optim.lr}}
    return config


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed with a readable log and without its shared-memory collectives.

    Those need a C++ compiler at first use and wait for ever for a rank that died; gloo raises within milliseconds.
    """
    import deepspeed
    from deepspeed.runtime.zero.muon import original_muon

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        # Muon's Newton-Schulz in bf16, its default, is emulated on most CPUs: several times slower than fp32.
        original_muon.ns_compute_dtype = lambda method: torch.float32
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def shard(module: Transformer, source: WeightSource | None, topology: Topology, config: dict, dtype: str) -> nn.Module:
    """This rank's part of a model: split over the tensor-parallel group and, where it comes from a source, loaded.

    source: weights for a module on the meta device; None for one that has its weights, all of them.
    """
    if source is not None:
        check_fits(module, source)
    if topology.tp > 1:
        from piflow_dist.parallel.tensor import split_layers

        split_layers(module, topology.mpu.get_tensor_model_parallel_group())
    if source is None:
        return module.to(topology.device)
    load_sharded(module, source, topology, DTYPES[dtype], config)
    return module


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Untouched:
    """In place of the autograd functions by which ZeRO-3 learns that a backward pass has reached a module."""

    @staticmethod
    def apply(value: Tensor) -> Tensor:
        return value


@contextmanager
def forward_mode(module: nn.Module) -> Iterator[None]:
    """ZeRO-3 gathers and frees weights as in every pass without gradients, but puts nothing in the way that has no forward-mode
    derivative: its marks for the backward pass, and its memory-efficient linear layer."""
    hooked = [part for part in module.modules() if "pre_bwd_fn" in part.__dict__]
    marks = [(part.pre_bwd_fn, part.post_bwd_fn) for part in hooked]
    linear, F.linear = F.linear, torch._C._nn.linear
    try:
        for part in hooked:
            part.pre_bwd_fn = part.post_bwd_fn = Untouched
        yield
    finally:
        F.linear = linear
        for part, (before, after) in zip(hooked, marks, strict=True):
            part.pre_bwd_fn, part.post_bwd_fn = before, after


class FrozenModel:
    """A model without optimiser whose weights are sharded over the data-parallel ranks."""

    def __init__(
        self, module: Transformer, source: WeightSource, topology: Topology, parallel: ParallelConfig, dtype: str
    ):
        deepspeed = import_deepspeed(topology.device)
        module.requires_grad_(False).eval()
        deepspeed.utils.set_z3_leaf_modules(module, list(module.leaf_modules))
        config = deepspeed_config(None, parallel, dtype)
        module = shard(module, source, topology, config, dtype)
        self.engine, *_ = deepspeed.initialize(model=module, mpu=topology.mpu, config=config)

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self.engine(*inputs)


class TiedTeacher:
    """The teacher inside a trained tied model: its frozen trunk, without adapters.

    Past the engine, whose own forward would make the next backward overwrite the accumulated gradient.
    """

    def __init__(self, model: "TrainedModel"):
        self.module = model.engine.module

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        return self.module(*inputs, adapted=False)


class TrainedModel:
    """A model under ZeRO-3 with its optimiser: fp32 master weights, any number of backwards per step."""

    def __init__(
        self,
        module: Transformer,
        source: WeightSource | None,
        topology: Topology,
        optim: OptimConfig,
        parallel: ParallelConfig,
        dtype: str,
    ):
        """source: weights for a module on the meta device; None for one that has its own."""
        deepspeed = import_deepspeed(topology.device)
        self.topology, self.optim = topology, optim
        config = deepspeed_config(optim, parallel, dtype)
        module.recompute_every = parallel.recompute_every
        module = shard(module, source, topology, config, dtype)
        # Hooks on every linear would cost more than the arithmetic of a small model, and many small messages of a large one.
        deepspeed.utils.set_z3_leaf_modules(module, list(module.leaf_modules))
        parameters = [p for p in module.parameters() if p.requires_grad]
        client = None
        if optim.type == "sgd":
            client = torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=client,
            mpu=topology.mpu,
            config=config,
        )
        # After a step DeepSpeed refreshes the weights that every rank keeps whole with one message each; step() sends one.
        self.kept_whole, self.optimizer.persistent_parameters = self.optimizer.persistent_parameters, []
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.shards = list(self._list_shards(names))

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def derivative(self, inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Tensor:
        """Of the mean velocity, along the tangents of the inputs (models/derivative.py); without dropout.

        Past the engine, as the tied teacher's passes are.
        """
        module, training = self.engine.module, self.engine.module.training
        module.eval()
        try:
            with forward_mode(module):
                return forward_derivative(lambda *values: module(*values)["mean"], inputs, tangents)
        finally:
            module.train(training)

    def step(self, lr_scale: float, clip: float) -> StepResult:
        """Reduce, clip to norm `clip` (0: not at all) and update with the configured learning rates times lr_scale."""
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * lr_scale
        self.optimizer.clip_grad = clip
        self.engine.step()
        self._gather_kept_whole()
        norm = float(self.engine.get_global_grad_norm())
        return StepResult(grad_norm=norm, applied=not self.optimizer.overflow, clipped=0 < clip < norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Calls inside are without dropout; between two steps only. The caller sees to it that no gradients are asked for."""
        self.engine.eval()
        try:
            yield
        finally:
            self.engine.train()

    def _gather_kept_whole(self) -> None:
        stale = [parameter for parameter in self.kept_whole if parameter.ds_status.name == "NOT_AVAILABLE"]
        if stale:
            stale[0].all_gather_coalesced(stale).wait()

    def _list_shards(self, names: dict[nn.Parameter, str]) -> Iterator[Shard]:
        for index, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                split_dim = partition_dim(parameter)
                yield Shard(names[parameter], tuple(parameter.ds_shape), split_dim, size, index, offset)
                offset += size

    @property
    def masters(self) -> list[Tensor]:
        """fp32 weights of this rank, one flat tensor per sub-group."""
        return self.optimizer.fp32_partitioned_groups_flat

    def named(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """Views of flat sub-group buffers by parameter name."""
        return {shard.name: flats[shard.group].narrow(0, shard.offset, shard.size) for shard in self.shards}

    def optimizer_state(self) -> dict[str, Tensor]:
        """{"exp_avg/<parameter>": shard, "step/<parameter>": scalar, ...}; empty before the first step."""
        state = {}
        for shard in self.shards:
            for key, value in self.optimizer.optimizer.state.get(self.masters[shard.group], {}).items():
                if torch.is_tensor(value) and value.numel() > 1:
                    state[f"{key}/{shard.name}"] = value.narrow(0, shard.offset, shard.size)
                else:
                    state[f"{key}/{shard.name}"] = torch.as_tensor(value)
        return state

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Tensor]) -> None:
        """Set the fp32 masters and the optimiser's state from this rank's shards, and refresh the working weights."""
        with torch.no_grad():
            for shard in self.shards:
                self.masters[shard.group].narrow(0, shard.offset, shard.size).copy_(weights[shard.name])
        keys = sorted({name.partition("/")[0] for name in optimizer_state})
        for index, master in enumerate(self.masters):
            members = [shard for shard in self.shards if shard.group == index]
            state = {}
            for key in keys:
                pieces = [optimizer_state[f"{key}/{s.name}"] for s in members if f"{key}/{s.name}" in optimizer_state]
                if pieces and pieces[0].dim() > 0:
                    state[key] = torch.cat(pieces).to(master.device)
                elif pieces:
                    # torch's Adam counts steps in a float tensor, DeepSpeed's own loop in an int.
                    state[key] = pieces[0].clone() if pieces[0].is_floating_point() else int(pieces[0])
            if state:
                self.optimizer.optimizer.state[master] = state
        self._set_working(self.masters)

    @contextmanager
    def working_with(self, flats: list[Tensor]) -> Iterator[None]:
        """Inside, forward passes compute with these weights, flat and sharded as the masters are: an average of them.

        Between steps only. The masters are not touched, and the working weights are made from them again at the end, to the bit
        and also after an exception: a step leaves them as the masters rounded to the working type, which is all they are.
        """
        try:
            self._set_working(flats)
            yield
        finally:
            self._set_working(self.masters)

    @torch.no_grad()
    def _set_working(self, flats: list[Tensor]) -> None:
        """Working weights (bf16, or the fp32 copy that forward gathers) do not follow the masters by themselves."""
        # Nor do weights that a forward pass has gathered and keeps for the next one: it frees what is needed late alone.
        self.optimizer.parameter_offload.partition_all_parameters()
        for index, flat in enumerate(flats):
            self.optimizer.fp16_partitioned_groups_flat[index].copy_(flat)
            self.optimizer._unflatten_partitioned_parameters(index)
        self._gather_kept_whole()
